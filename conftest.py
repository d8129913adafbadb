"""What one pytest run is about: the tests, or with --benchmark the speed reports of benchmarks/."""

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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_benchmark = collection_path.is_relative_to(BENCHMARKS)
    if config.getoption("speed_reports"):
        return not (is_benchmark or BENCHMARKS.is_relative_to(collection_path)) or None
    return is_benchmark or None
