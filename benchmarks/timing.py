"""Interleaved timing: A B A B, so that a machine that slows down slows everybody down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.implementations import Call

SECONDS_PER_ROW = 1.0
ROUNDS = range(7, 301)


def check(call: Call, reference: Call) -> None:
    """No time is worth reporting for other numbers than the reference's."""
    with call.active():
        actual = call()
    with reference.active():
        expected = reference()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


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
