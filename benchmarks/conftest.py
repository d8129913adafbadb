"""Guards the speed report, collects its rows, prints it, and has pytest-benchmark's JSON carry the same facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from attn_ext import backend
from benchmarks import guards, load, packages, peak_memory, report
from benchmarks.bounds import Part
from benchmarks.implementations import Implementation
from benchmarks.shapes import Shape
from benchmarks.timing import Timed, race

SLOW = 0.05  # seconds: of a peer's call, which then takes part in a few rounds only

ROWS = pytest.StashKey[list[report.Row]]()
ABSENT = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[ABSENT] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if problem := backend.unavailable():
        raise pytest.UsageError(f"there is nothing to time: {problem}")
    items.sort(key=lambda item: item.path.stem != "test_op")  # the op before what is made of it


@pytest.fixture(scope="session")
def package_peers(absent: dict[str, str]) -> tuple[Implementation, ...]:
    """The attention layers of other packages; the missing ones are named in the report."""
    peers, missing = packages.load()
    absent |= missing
    return peers


@pytest.fixture(scope="session")
def is_guarded(request: pytest.FixtureRequest) -> bool:
    """Whether times are to be believed; where they are, the tests have passed."""
    config = request.config
    if config.getoption("benchmark_disable") or config.getoption("benchmark_unguarded"):
        return False
    if red := guards.red_tests():
        pytest.exit(f"nothing is timed, since tests of it fail:\n{red}", returncode=1)
    return True


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, is_guarded: bool) -> Callable[..., None]:
    """Races a call against its peers and records the row."""

    def measure(
        mode: str,
        method: str,
        shape: Shape,
        direction: str,
        call: Timed,
        peers: Sequence[Timed],
        rivals: dict[str, str],
        parts: Sequence[Part],
        warm: bool = True,
        slow: float = SLOW,
    ) -> None:
        if is_guarded and (busy := guards.busy_machine()):
            pytest.exit(f"{busy}: --benchmark-unguarded measures all the same", returncode=1)
        extra_bytes = peak_memory.extra_bytes(call)
        then = load.Moment.now()
        rounds = race(benchmark, call, peers, [part.probe for part in parts], warm and not shape.is_cold, slow)
        others = load.others_since(then)
        if rounds:
            row = report.Row.of(mode, method, shape, direction, rounds, rivals, parts, extra_bytes, others)
            benchmark.extra_info |= row.extra_info()
            request.config.stash[ROWS].append(row)

    return measure


@pytest.fixture(scope="session")
def absent(request: pytest.FixtureRequest) -> dict[str, str]:
    """Where a peer that cannot take part is to be named, with the reason."""
    return request.config.stash[ABSENT]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["attn_ext"] = report.settings()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section("fused against its peers")
        for line in report.lines(rows, config.stash[ABSENT]):
            terminalreporter.write_line(line)
