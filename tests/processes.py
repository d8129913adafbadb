"""Python processes of their own, for what is settled when attn_ext is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attn_ext

PACKAGE = Path(attn_ext.__file__).parent

# The backend, and what makes a pytest a worker of another one.
OWN_TO_THE_TESTS = ("ATTN_EXT_BACKEND", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments` in `cwd`, where imports look first, without the backend and the test run of this one."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_TO_THE_TESTS}
    # Without site (-S) there is no hook of an editable install, which would find its extension for a copy without one.
    path = os.pathsep.join([str(cwd), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def info(cwd: Path, **environment: str) -> dict[str, str]:
    """`python -m attn_ext.info`, label to text."""
    process = python("-m", "attn_ext.info", cwd=cwd, **environment)
    assert process.returncode == 0, process.stderr
    return {label: text.strip() for label, text in (line.split(":", 1) for line in process.stdout.splitlines())}
