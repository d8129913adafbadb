"""What must hold before anything is timed: the tests of what is timed pass, and the machine has nothing else to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import load

ROOT = Path(__file__).parents[1]
# Of the ops, the projections around them, and a decoder's memory; what torch.compile makes of them is not timed.
TESTS = tuple(f"tests/test_{name}.py" for name in ("dot", "additive", "masking", "general", "memory"))


def red_tests() -> str | None:
    """None if the tests pass; otherwise the end of what pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compiled", *TESTS]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if process.returncode == 0 else (process.stdout + process.stderr)[-2000:]


def busy_machine(patience: float = 15.0) -> str | None:
    """None as soon as the machine is quiet; after so many seconds, who keeps it busy."""
    others = load.wait_for_quiet(patience)
    if others is None:
        return None
    return f"other processes keep {others:.1f} of the cores busy ({', '.join(load.busiest()) or 'none of this system'})"
