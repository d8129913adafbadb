"""Speed reports from the repository's root: `pytest --benchmark`, `python -m benchmarks.targets`."""

import os

# Before torch is imported: its profiler, which counts memory, would announce itself amid the reports.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
