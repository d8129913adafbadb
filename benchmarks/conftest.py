"""Collects the rows of a report, prints it when the run ends, and has pytest-benchmark's JSON carry the same facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attn_ext import backend
from benchmarks import report

ROWS = pytest.StashKey[list[report.Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems() -> None:
    if problem := backend.unavailable():
        raise pytest.UsageError(f"there is nothing to time: {problem}")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[report.Row], None]:
    return request.config.stash[ROWS].append


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["attn_ext"] = report.settings()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section("fused against its peers")
        for line in report.lines(rows):
            terminalreporter.write_line(line)
