"""Interleaved timing: all in turns, so that a machine that slows down slows everybody down.

Each round has an order of its own: a call finds the caches as the one before it left them, and nobody is always behind
the same one, which may have read the same inputs.
"""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.machine import available_memory

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SECONDS_PER_ROW = 0.4
ROUNDS = range(7, 301)
RESERVE = 1 << 30  # bytes that kept_pages() has touched before the first call: several of the largest gradients
GLIBC_LARGEST_THRESHOLD = 32 << 20  # bytes; its mmap threshold's, on 64-bit machines
SLOW_ROUNDS = 2
SPINNING = 5e-3  # seconds that a thread of OpenMP's keeps its core busy when it has nothing to do
SHORTEST_SAMPLE = 2e-4  # seconds: a call that takes less is repeated within a sample

# Of a tensor's largest value. Halves: a few units of their last place, which hand-written eager code loses on the way.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}

_ORDERS = random.Random(0)  # one for all rows, so that those of few rounds do not all have the same few orders
Turn = TypeVar("Turn")


class Timed(Protocol):
    """What can be timed: calling it does the work once, inside `active()`, which is not timed."""

    @property
    def name(self) -> str: ...

    @property
    def active(self) -> Callable[[], AbstractContextManager[object]]: ...

    def __call__(self) -> object: ...


class WrongResultError(AssertionError):
    """What was to be timed does not compute what the reference does."""


def check(call: Timed, reference: Timed) -> None:
    """No time is worth reporting for other numbers than the reference's, up to the rounding of a tensor's sums.

    Raises:
        WrongResultError: it names the call and the result.
    """
    expected = _results(reference)
    sizes = [wanted.abs().max().item() for wanted in expected]
    for i, (result, wanted, size) in enumerate(zip(_results(call), expected, sizes, strict=True)):
        # By element it would fail the more exact of the two where sums of 80000 terms cancel (the gradient of v). Where
        # all of it cancels (with S = 1, no score has a gradient), what cancelled was of the others' size.
        error = (result - wanted).abs().max().item()
        rounded = wanted.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        allowed = TOLERANCE[torch.bfloat16 if rounded else wanted.dtype] * (size or max(sizes))
        if not error <= allowed:
            raise WrongResultError(f"{call.name}: result {i} is off by {error:.1e}, allowed is {allowed:.1e}")


def _results(call: Timed) -> list[Tensor]:
    with call.active():
        return [result for result in call() if result is not None]


def sample(call: Timed, repeats: int = 1, warm: bool = False) -> float:
    """Seconds a call, once. `warm`: after an untimed one, which leaves in the caches what they can hold."""
    with call.active():
        if warm:
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Schedule:
    """How long to measure: `seconds` a row, within `rounds`; a peer over `too_slow` seconds is not called again.

    `warm`: every sample is. Otherwise it finds the caches, and the threads, as the call before it left them.
    """

    seconds: float = SECONDS_PER_ROW
    rounds: range = ROUNDS
    too_slow: float = math.inf
    warm: bool = False


def shuffled(turns: Iterable[Turn]) -> list[Turn]:
    """In another order each time, the same from one run of the program to the next."""
    turns = list(turns)
    _ORDERS.shuffle(turns)
    return turns


def interleave(calls: Sequence[Timed], schedule: Schedule) -> dict[str, list[float]]:
    """Seconds a call by name, in rounds of one sample of each; the calls after the first are its peers."""
    warm_up = [(call, sample(call)) for call in calls]
    seconds = {call.name: [once] for call, once in warm_up}
    repeated = {}
    for call, once in warm_up:
        if once <= schedule.too_slow or (call is calls[0] and len(calls) > 1):
            again = sample(call) if once < schedule.seconds else once
            repeated[call.name] = (call, again, math.ceil(SHORTEST_SAMPLE / again))
    if not repeated:
        return seconds
    seconds |= {name: [] for name in repeated}
    a_round = sum(again * (repeats + schedule.warm) for _, again, repeats in repeated.values())
    for _ in range(min(max(int(schedule.seconds / a_round), schedule.rounds[0]), schedule.rounds[-1])):
        for call, _, repeats in shuffled(repeated.values()):
            seconds[call.name].append(sample(call, repeats, schedule.warm))
    return seconds


@dataclass(frozen=True)
class Ratio:
    """The median and the quartiles of the rounds' own ratios.

    Not of two medians: where the machine changes its pace in the middle of a row, they come from different paces.
    """

    value: float
    low: float
    high: float
    rounds: int | None = field(default=None, compare=False)  # None: nobody has kept it

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float], factor: float = 1.0) -> Ratio:
        """factor * numerator / denominator, of samples from the same rounds, as far as both go; one has no spread."""
        if min(len(numerator), len(denominator)) < 2:
            value = factor * statistics.median(numerator) / statistics.median(denominator)
            return cls(value, value, value, 1)
        ratios = [factor * a / b for a, b in zip(numerator, denominator, strict=False)]
        low, value, high = statistics.quantiles(ratios, method="inclusive")
        return cls(value, low, high, len(ratios))


def race(
    benchmark: BenchmarkFixture, call: Timed, peers: Sequence[Timed], probes: Sequence[Timed], warm: bool, slow: float
) -> dict[str, list[float]]:
    """Seconds by name, round by round: of `call`, whose rounds pytest-benchmark records, and of its probes and peers.

    Samples are warm, or find the caches as the call before left them. A peer that takes longer than `slow` seconds
    takes part in the first `SLOW_ROUNDS` only.
    """
    seconds: dict[str, list[float]] = {other.name: [] for other in (*probes, *peers)}
    repeats: dict[str, int] = {}
    left: dict[str, int] = {}  # rounds, of the slow ones

    def turn_of_probes() -> None:
        for probe in probes:
            seconds[probe.name].append(sample(probe, repeats[probe.name]))
        # Their threads still wait for more of the same, at the cost of a call that has one: until they sleep.
        time.sleep(SPINNING)

    def turn_of(peer: Timed) -> None:
        if left.get(peer.name) == 0:
            return
        seconds[peer.name].append(sample(peer, repeats[peer.name], warm and peer.name not in left))
        if peer.name in left:
            left[peer.name] -= 1

    def round_of_others() -> None:
        for turn in shuffled([turn_of_probes, *(partial(turn_of, peer) for peer in peers)]):
            turn()
        if warm:
            call()

    def calls() -> None:
        for _ in range(repeats[call.name]):
            call()

    with call.active():
        a_round = SPINNING
        for each in (*probes, *peers, call):
            once = sample(each)
            if once <= slow:  # the first call of all may have set something up
                once = sample(each)
            repeats[each.name] = math.ceil(SHORTEST_SAMPLE / once)
            a_round += (repeats[each.name] + warm) * once
            if each in peers and once > slow:
                left[each.name] = SLOW_ROUNDS
        rounds = min(max(int(SECONDS_PER_ROW / a_round), ROUNDS[0]), ROUNDS[-1])
        benchmark.pedantic(calls, setup=round_of_others, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: one round, for whoever wants to see it run
        return {}
    # Of a call, like all others here: pytest-benchmark would repeat it itself, but not where each round has a setup.
    of_a_call = benchmark.stats.stats.data
    of_a_call[:] = [each / repeats[call.name] for each in of_a_call]
    return {call.name: list(of_a_call)} | seconds


@contextmanager
def kept_pages() -> Iterator[None]:
    """The C library keeps freed memory for the next allocation, so that no call pays for the kernel's zeroed pages.

    By default glibc maps every large tensor anew, and a fresh page costs several times its traffic. Elsewhere than on
    glibc this changes nothing.
    """
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    # Where freed gradients leave gaps that the next ones do not fit, the heap would grow for many calls more: the room
    # that it takes then is there, and touched.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    size = min(RESERVE, available_memory() // 2)
    if reserve := libc.malloc(size):
        ctypes.memset(reserve, 1, size)
        libc.free(reserve)
    try:
        yield
    finally:
        # Once told, glibc no longer raises its thresholds by itself. They go where a program that has freed one large
        # tensor has them.
        libc.mallopt(m_mmap_max, 65536)
        libc.mallopt(m_mmap_threshold, GLIBC_LARGEST_THRESHOLD)
        libc.mallopt(m_trim_threshold, 2 * GLIBC_LARGEST_THRESHOLD)
        libc.malloc_trim(0)
