"""Interleaved timing: A B A B, so that a machine that slows down slows everybody down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.implementations import Call

SECONDS_PER_ROW = 1.0
ROUNDS = range(7, 301)


def check(call: Call, reference: Call) -> None:
    """No time is worth reporting for other numbers than the reference's, up to the rounding of a tensor's sums."""
    with call.active():
        actual = call()
    with reference.active():
        expected = reference()
    for i, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
        # By element it would fail the more exact of the two where sums of 80000 terms cancel (the gradient of v).
        error, allowed = (result - wanted).abs().max().item(), 3e-5 * wanted.abs().max().item()
        assert error <= allowed, f"{call.name}: result {i} is off by {error:.1e}, allowed is {allowed:.1e}"


def race(benchmark: BenchmarkFixture, call: Call, peers: Sequence[Call]) -> dict[str, float]:
    """Median seconds by name. Each recorded round of `call` follows one round of every peer."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}

    def peers_round() -> None:
        for peer in peers:
            with peer.active():
                start = time.perf_counter()
                peer()
                seconds[peer.name].append(time.perf_counter() - start)

    with call.active():
        start = time.perf_counter()
        peers_round()
        call()
        affordable = int(SECONDS_PER_ROW / (time.perf_counter() - start))
        rounds = min(max(affordable, ROUNDS[0]), ROUNDS[-1])
        benchmark.pedantic(call, setup=peers_round, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: one round, for whoever wants to see it run
        return {}
    measured = {name: statistics.median(times[-rounds:]) for name, times in seconds.items()}
    return {call.name: benchmark.stats.stats.median} | measured
