"""What one pytest run is about: the tests, or with --benchmark or --benchmark-full the speed reports of benchmarks/."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest-benchmark owns --benchmark-*; pytest takes no abbreviations of options, so the bare name is free.
    parser.addoption(
        "--benchmark",
        action="store_true",
        dest="speed_reports",
        help="run the speed reports in benchmarks/ instead of the tests",
    )
    parser.addoption(
        "--benchmark-full",
        action="store_true",
        help="the same with every shape of the grid, and torch.compile with its autotuning too: hours",
    )
    parser.addoption(
        "--benchmark-unguarded",
        action="store_true",
        help="do not run the tests of what is timed first, and do not mind a busy machine",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    config.option.speed_reports |= config.option.benchmark_full
    if config.getoption("speed_reports"):
        # The report's own table says what pytest-benchmark's would, with the peers beside it.
        config.option.benchmark_quiet = True
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args[:] = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    inside = collection_path.is_relative_to(BENCHMARKS)
    wanted = inside or BENCHMARKS.is_relative_to(collection_path) if config.getoption("speed_reports") else not inside
    return None if wanted else True
