"""The reports: their rows, what stands above them, and the tables."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby

import torch

import attn_ext
from attn_ext import backend
from benchmarks.implementations import FUSED
from benchmarks.machine import commit, processor
from benchmarks.shapes import Shape
from benchmarks.timing import Ratio


@dataclass(frozen=True)
class Row:
    """Median seconds by implementation, the fused op's first, and how many times as long each peer takes."""

    method: str
    shape: Shape
    direction: str
    seconds: dict[str, float]
    ratios: dict[str, Ratio]

    @classmethod
    def of(cls, method: str, shape: Shape, direction: str, rounds: dict[str, list[float]]) -> Row:
        """Of seconds by implementation, round by round."""
        medians = {name: statistics.median(times) for name, times in rounds.items()}
        fused = rounds[FUSED.name]
        ratios = {name: Ratio.of(times, fused) for name, times in rounds.items() if name != FUSED.name}
        return cls(method, shape, direction, medians, ratios)

    def extra_info(self) -> dict[str, object]:
        """What pytest-benchmark's JSON keeps beside the fused op's own timing."""
        return {
            "method": self.method,
            "use": self.shape.use,
            "B,T,S,H": self.shape.sizes,
            "direction": self.direction,
            "median_seconds": self.seconds,
            "ratio": {peer: asdict(ratio) for peer, ratio in self.ratios.items()},
        }


@dataclass(frozen=True)
class Finding:
    """One measured ratio against one of the targets of docs/performance.md.

    `seconds` are the medians it was taken from, by name. `wanted` None: nothing is asked of it.
    """

    target: int
    kernel: str  # "dot", "additive", or what else was run
    direction: str
    shape: Shape
    measure: str
    unit: str  # "%", of a limit; "x", of a time or a size; "e", a relative error
    ratio: Ratio
    wanted: float | None
    at_most: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "reached", or by how much of the wanted value it was missed."""
        if self.wanted is None:
            return ""
        missing = self.ratio.value / self.wanted - 1 if self.at_most else 1 - self.ratio.value / self.wanted
        if missing <= 0:
            return "reached"
        inside = self.ratio.low <= self.wanted <= self.ratio.high
        return f"missed by {missing:.1%}{', within the spread' if inside else ''}"

    def line(self) -> str:
        """What was measured, its value and quartiles, what was wanted, the verdict."""
        numbers = [self.ratio.value, self.ratio.low, self.ratio.high]
        value, low, high = (format(n, {"%": ".0%", "x": ".2f", "e": ".0e"}[self.unit]) for n in numbers)
        suffix = "x" if self.unit == "x" else ""
        wanted = ""
        if self.wanted is not None:
            text = f"{self.wanted:.0%}" if self.unit == "%" else f"{self.wanted:g}{suffix}"
            wanted = f"{'<=' if self.at_most else '>='} {text}"
        return (
            f"  {self.kernel:<13}{_sizes(self.shape):<19}{self.direction:<17}{self.measure:<45}"
            f"{value + suffix:>9} {f'({low} to {high})':<20}{wanted:<10}{self.verdict}"
        )


def settings() -> dict[str, str]:
    """What every number below depends on."""
    facts = backend.build_facts() or {}
    return {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, {torch.ops.attn_ext.cpu_capability()} kernels",
        "waiting": f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')}",
        "software": f"PyTorch {torch.__version__}, Python {platform.python_version()}, attn_ext {attn_ext.__version__}",
        "commit": commit(),
        "build": ", ".join(f"{name}: {value}" for name, value in facts.items()),
    }


def header() -> Iterator[str]:
    for name, text in settings().items():
        yield f"{name:<10}{text}"


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The settings, a table of all rows, and each method's ratios in one line."""
    yield from header()
    yield "numbers   float32, with weights; medians of interleaved rounds; ratio: the peer's time over the fused op's"
    peers = list(rows[0].ratios)
    yield ""
    yield f"{'method':<9}{'use':<24}{'(B,T,S,H)':<18}{'direction':<18}{FUSED.name:>12}" + "".join(
        f"{peer:>12}{'ratio':>8}" for peer in peers
    )
    for method, of_method in groupby(rows, key=lambda row: row.method):
        yield ""
        for row in of_method:
            yield (
                f"{method:<9}{row.shape.use:<24}{_sizes(row.shape):<18}{row.direction:<18}{_time(row.seconds[FUSED.name])}"
                + "".join(f"{_time(row.seconds[peer])}{row.ratios[peer].value:>7.2f}x" for peer in peers)
            )
    yield ""
    for method, of_method in groupby(rows, key=lambda row: row.method):
        by_direction = sorted(of_method, key=lambda row: row.direction)
        for direction, of_direction in groupby(by_direction, key=lambda row: row.direction):
            yield f"{method:<9}{direction:<18}{_summary(list(of_direction), peers)}"


def _summary(rows: list[Row], peers: Sequence[str]) -> str:
    weakest = {peer: min(rows, key=lambda row, peer=peer: row.ratios[peer].value) for peer in peers}
    return "; ".join(
        f"{statistics.geometric_mean(row.ratios[peer].value for row in rows):.2f}x the speed of the {peer} (geometric "
        f"mean), least {weakest[peer].ratios[peer].value:.2f}x: {weakest[peer].shape.use}"
        for peer in peers
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:>9.3f} ms"


def _sizes(shape: Shape) -> str:
    return f"({','.join(map(str, shape.sizes))})"
