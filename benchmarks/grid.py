"""Every shape that anybody might have, against every peer that returns the same results (target 5)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from benchmarks.implementations import (
    COMPILED,
    DIRECTIONS,
    EAGER,
    FUSED,
    NO_WEIGHTS,
    OPS,
    REFERENCE,
    SDPA,
    Call,
    Implementation,
    Problem,
)
from benchmarks.machine import available_memory
from benchmarks.shapes import GRID_COMPILED, Shape
from benchmarks.timing import Ratio, Schedule, check, interleave

CHECKED_ELEMENTS = 1 << 24  # B T S D of the largest problem given to the reference


@dataclass(frozen=True)
class Cell:
    """One shape in one direction: median seconds, and each peer's time over that of the fused call with its results."""

    method: str
    B: int
    T: int
    S: int
    D: int
    direction: str
    checked_at: tuple[int, int, int, int]  # B, T, S, D of the comparison with the reference
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # peers by name, and why

    @property
    def key(self) -> tuple[str, int, int, int, int, str]:
        return self.method, self.B, self.T, self.S, self.D, self.direction

    @property
    def worst(self) -> tuple[str, Ratio] | None:
        """The peer that comes closest, or wins; None where none could run."""
        return min(self.ratios.items(), key=lambda item: item[1].value, default=None)

    @property
    def is_lost(self) -> bool:
        """Whether some peer wins in more than three quarters of the rounds."""
        return any(ratio.value < 1 and ratio.high < 1 for ratio in self.ratios.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cell:
        ratios = {name: Ratio(**ratio) for name, ratio in data["ratios"].items()}
        return cls(**data | {"ratios": ratios, "checked_at": tuple(data["checked_at"])})

    def __str__(self) -> str:
        return f"{self.method} ({self.B},{self.T},{self.S},{self.D}) {self.direction}"


def measure(
    shapes: Sequence[Shape],
    schedule: Schedule,
    done: Iterable[Cell],
    keep: Callable[[Cell], None],
    methods: Sequence[str] = OPS,
    minutes: float = math.inf,
) -> list[Cell]:
    """The cells of `shapes`, those in `done` as they are; each new one is given to `keep` at once.

    After so many `minutes` no new one is begun; a later run with what is done goes on.
    """
    deadline = time.monotonic() + 60 * minutes
    cells = {cell.key: cell for cell in done}
    wanted = [(method, shape, direction) for shape in shapes for method in methods for direction in DIRECTIONS]
    missing = [each for each in wanted if (each[0], *each[1].sizes, each[2]) not in cells]
    checked: dict[tuple[str, Shape], tuple[int, int, int, int]] = {}
    for method, shape, direction in tqdm(missing, "grid", unit="cell", disable=None):
        if time.monotonic() > deadline:
            break
        if (method, shape) not in checked:
            checked[method, shape] = check_results(method, shape)
        cell = _measure(method, shape, direction, schedule, checked[method, shape])
        cells[cell.key] = cell
        keep(cell)
    keys = ((method, *shape.sizes, direction) for method, shape, direction in wanted)
    return [cells[key] for key in keys if key in cells]


def check_results(
    method: str, shape: Shape, implementations: Sequence[Implementation] = (FUSED, EAGER, SDPA)
) -> tuple[int, int, int, int]:
    """Compares them with the reference, at `shape` or with so much less of B, then of T, that the reference is quick.

    Returns:
        B, T, S, D of the comparison.

    Raises:
        WrongResultError: one of them computes something else.
    """
    B, T, S, D = shape.sizes
    T = max(1, min(T, CHECKED_ELEMENTS // (S * D)))
    B = max(1, min(B, CHECKED_ELEMENTS // (T * S * D)))
    problem = Problem(method, Shape(shape.use, B, T, S, D))
    for need_weights in (True, False):
        reference = Call(REFERENCE, problem, "forward+backward", need_weights)
        for implementation in implementations:
            if implementation.accepts(method, need_weights):
                check(Call(implementation, problem, "forward+backward", need_weights), reference)
    return problem.shape.sizes


def _measure(
    method: str, shape: Shape, direction: str, schedule: Schedule, checked_at: tuple[int, int, int, int]
) -> Cell:
    cell = Cell(method, *shape.sizes, direction, checked_at)
    peers = []
    for peer in (EAGER, SDPA, COMPILED):
        if peer is COMPILED and shape.sizes not in {each.sizes for each in GRID_COMPILED}:
            continue
        if reason := why_skipped(peer, method, shape, direction):
            cell.skipped[peer.name] = reason
        else:
            peers.append(peer)
    problem = Problem(method, shape)
    calls = [Call(FUSED, problem, direction), *(Call(peer, problem, direction, peer.returns_weights) for peer in peers)]
    if any(not peer.returns_weights for peer in peers):
        calls.append(Call(FUSED, problem, direction, need_weights=False, name=NO_WEIGHTS))
    seconds = interleave(calls, schedule)
    cell.seconds.update((name, statistics.median(times)) for name, times in seconds.items())
    for peer in peers:
        rival = FUSED.name if peer.returns_weights else NO_WEIGHTS
        cell.ratios[peer.name] = Ratio.of(seconds[peer.name], seconds[rival])
    return cell


def why_skipped(peer: Implementation, method: str, shape: Shape, direction: str) -> str | None:
    """Why `peer` does not run: it returns something else, or does not fit in half of the free memory."""
    if not (peer.accepts(method, need_weights=True) or peer.accepts(method, need_weights=False)):
        return f"has no {method} scores"
    needed = peer.peak_bytes(method, shape, direction)
    if needed > available_memory() / 2:
        return f"its intermediates need {needed / 1e9:.3g} GB"
    return None


def estimate(shapes: Sequence[Shape], schedule: Schedule, methods: Sequence[str] = OPS) -> float:
    """Seconds that the cells will take, roughly: twice their own where they are cheap, their least rounds where not."""
    total = 0.0
    for shape in shapes:
        for method in methods:
            for direction, passes in zip(DIRECTIONS, (1, 3), strict=True):
                fused, eager = (
                    (10e9, 0.2e9) if method == "additive" else (50e9, 40e9)
                )  # B T S D a second, two old cores
                each = passes * shape.elements / fused
                if not why_skipped(EAGER, method, shape, direction):
                    once = passes * shape.elements / eager
                    each += once if once < schedule.too_slow else 0.0
                    total += once
                total += max(schedule.seconds, schedule.rounds[0] * each)
                if shape.sizes in {each.sizes for each in GRID_COMPILED}:
                    total += 15.0
    return total


def summary(cells: Sequence[Cell]) -> list[str]:
    """The count of losing cells, the ten worst, and the worst by name."""
    raced = sorted((cell for cell in cells if cell.worst), key=lambda cell: cell.worst[1].value)
    lost = [cell for cell in raced if cell.is_lost]
    below = sum(cell.worst[1].value < 1 for cell in raced)
    lines = [
        f"  {len(lost)} of {len(raced)} cells lost to some peer beyond the spread, {below - len(lost)} within it; "
        f"{len(cells) - len(raced)} without a peer that fits in memory"
    ]
    for cell in raced[:10]:
        peer, ratio = cell.worst
        lines.append(f"  {ratio.value:>7.2f}x ({ratio.low:.2f} to {ratio.high:.2f})  {cell} against {peer}")
    if raced:
        peer, ratio = raced[0].worst
        lines.append(f"  worst cell: {raced[0]}, {ratio.value:.2f}x the speed of {peer}")
    return lines
