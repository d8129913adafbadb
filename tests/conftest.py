"""The marks, of which `fused` needs the compiled ops, and what every test may rely on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch is imported: on a machine shared with others, OpenMP threads that spin while they wait cost minutes. The
# speed report, which passes by here too, wants a quiet machine and the threads as everybody has them.
if not {"--benchmark", "--benchmark-full"} & set(sys.argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from attn_ext import backend


def why_not_fused() -> str | None:
    """What keeps this run from the compiled ops, or None. tests/test_build.py fails where it is not by choice."""
    if backend.current() == "reference":
        return f"{backend.ENVIRONMENT_VARIABLE}=reference"
    return backend.unavailable()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fused: needs the compiled ops")
    config.addinivalue_line("markers", "cpu: the CPU's threads, or values that nobody waits for another device to see")
    config.addinivalue_line("markers", "numerics: runs again under every instruction set (tests/test_capabilities.py)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fused") and (reason := why_not_fused()):
        pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a test has recorded, by title: a worker of a test run has no terminal of its own."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for title, text in report.user_properties:
                terminalreporter.section(title)
                terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _process_wide_settings() -> Iterator[None]:
    """Whatever a test sets for the whole process ends with it."""
    name, threads, precision = backend.current(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    backend.use_backend(name)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(params=[pytest.param("fused", marks=pytest.mark.fused), "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under each backend."""
    with backend.use_backend(request.param):
        yield request.param
