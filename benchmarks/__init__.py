"""Speed reports from the repository's root: `pytest --benchmark`, `python -m benchmarks.targets`."""
