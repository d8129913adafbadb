"""luong_attention, forward and with its backward pass, against its peers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.implementations import DIRECTIONS, FUSED, METHODS, PEERS, REFERENCE, Call, Problem
from benchmarks.report import Row
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import check, race


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_op(
    method: str, shape: Shape, direction: str, benchmark: BenchmarkFixture, record: Callable[[Row], None]
) -> None:
    problem = Problem(method, shape)
    calls = {i.name: Call(i, problem, direction) for i in (FUSED, *PEERS)}
    for call in calls.values():
        check(call, calls[REFERENCE.name])
    rounds = race(benchmark, calls[FUSED.name], [calls[peer.name] for peer in PEERS])
    if rounds:
        row = Row.of(method, shape, direction, rounds)
        benchmark.extra_info |= row.extra_info()
        record(row)
