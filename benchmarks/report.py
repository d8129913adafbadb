"""The reports: their rows, what stands above them, and the tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import attn_ext
from attn_ext import backend
from benchmarks.bounds import Part, largest
from benchmarks.implementations import FUSED
from benchmarks.load import QUIET
from benchmarks.machine import commit, processor
from benchmarks.shapes import Shape
from benchmarks.timing import Ratio


@dataclass(frozen=True)
class Row:
    """One line of the speed report.

    `seconds` are medians by name, `ratios` how many times as long as the fused op each peer takes. `share` is the time
    of the op's limit over its own, `bound` the limit's largest part, `extra_bytes` what the op holds at its peak beyond
    inputs and results, `others` the cores that other processes kept busy meanwhile.
    """

    mode: str  # "op", or "decoder": T steps, each of which attends
    method: str
    shape: Shape
    direction: str
    seconds: dict[str, float]
    ratios: dict[str, Ratio]
    bound: str
    share: Ratio | None
    rates: dict[str, float]  # of the limits, a second, in this row's rounds
    extra_bytes: int
    others: float

    @classmethod
    def of(
        cls,
        mode: str,
        method: str,
        shape: Shape,
        direction: str,
        rounds: dict[str, list[float]],
        rivals: dict[str, str],
        parts: Sequence[Part],
        extra_bytes: int,
        others: float,
    ) -> Row:
        """Of seconds by name, round by round. `rivals`: each peer's fused call, the one with the same results."""
        medians = {name: statistics.median(times) for name, times in rounds.items()}
        ratios = {peer: Ratio.of(rounds[peer], rounds[rival]) for peer, rival in rivals.items()}
        share, bound = None, "no compiler for the probes"
        if parts:
            bound = largest(parts, medians)
            of_parts = zip(*(map(part.seconds, rounds[part.probe.name]) for part in parts), strict=True)
            share = Ratio.of([sum(seconds) for seconds in of_parts], rounds[FUSED.name])
        rates = {part.probe.name: part.probe.amount / medians[part.probe.name] for part in parts}
        return cls(mode, method, shape, direction, medians, ratios, bound, share, rates, extra_bytes, others)

    @property
    def closest(self) -> tuple[str, Ratio]:
        """The peer that comes closest, or wins; there must be one."""
        return min(self.ratios.items(), key=lambda item: item[1].value)

    @property
    def is_disturbed(self) -> bool:
        return self.others > QUIET

    def extra_info(self) -> dict[str, object]:
        """What pytest-benchmark's JSON keeps beside the fused op's own timing."""
        return {
            "mode": self.mode,
            "method": self.method,
            "use": self.shape.use,
            "B,T,S,H": self.shape.sizes,
            "cold": self.shape.is_cold,
            "direction": self.direction,
            "median_seconds": self.seconds,
            "ratio": {peer: asdict(ratio) for peer, ratio in self.ratios.items()},
            "bound": self.bound,
            "share": self.share and asdict(self.share),
            "rates": self.rates,
            "extra_bytes": self.extra_bytes,
            "others": self.others,
        }

    @classmethod
    def from_info(cls, info: dict[str, Any]) -> Row:
        """Back from :meth:`extra_info`."""
        return cls(
            info["mode"],
            info["method"],
            Shape(info["use"], *info["B,T,S,H"], is_cold=info["cold"]),
            info["direction"],
            info["median_seconds"],
            {peer: Ratio(**ratio) for peer, ratio in info["ratio"].items()},
            info["bound"],
            info["share"] and Ratio(**info["share"]),
            info["rates"],
            info["extra_bytes"],
            info["others"],
        )

    @property
    def name(self) -> str:
        """What is measured."""
        return f"{self.mode} {self.method} {self.shape.label} {self.shape.use}, {self.direction}"

    def line(self) -> str:
        """What the table has of it."""
        share = f"{self.share.value:>5.0%} of {self.bound}" if self.share else f"      {self.bound}"
        ratios = sorted(self.ratios.items(), key=lambda item: item[1].value)
        return (
            f"{self.method:<9}{self.shape.use:<24}{self.shape.label:<18}{self.direction:<18}"
            f"{_time(self.seconds[FUSED.name])}{' !' if self.is_disturbed else '  '}{share:<40}"
            f"{self.extra_bytes / 1e6:>7.1f} MB  " + ", ".join(f"{peer} {ratio.value:.2f}x" for peer, ratio in ratios)
        )


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
            f"  {self.kernel:<13}{self.shape.label:<19}{self.direction:<17}{self.measure:<45}"
            f"{value + suffix:>9} {f'({low} to {high})':<20}{wanted:<10}{self.verdict}"
        )


def settings() -> dict[str, str]:
    """What every number below depends on."""
    facts = backend.build_facts() or {}
    return {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, {torch.ops.attn_ext.cpu_capability()} kernels",
        "waiting": f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')}",
        "precision": f"{torch.get_float32_matmul_precision()}, of float32 products",
        "software": f"PyTorch {torch.__version__}, Python {platform.python_version()}, attn_ext {attn_ext.__version__}",
        "commit": commit(),
        "build": ", ".join(f"{name}: {value}" for name, value in facts.items()),
    }


def settings_of(document: dict[str, Any]) -> dict[str, str]:
    """What a run's numbers depend on: of the targets' JSON or pytest-benchmark's; empty if it is neither."""
    return document.get("settings") or document.get("machine_info", {}).get("attn_ext", {})


class NotARecordError(ValueError):
    """A file is missing, or holds nothing of what is to be made of it."""


def read(path: Path) -> dict[str, Any]:
    """The JSON that a run has left.

    Raises:
        NotARecordError: it cannot be read, or is none of this project's.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NotARecordError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict) or not settings_of(document):
        raise NotARecordError(f"{path} has none of the settings that benchmarks/report.py writes")
    return document


def header() -> Iterator[str]:
    for name, text in settings().items():
        yield f"{name:<10}{text}"


def lines(rows: Sequence[Row], absent: dict[str, str]) -> Iterator[str]:
    """The settings, a table of all rows, each method's ratios in one line, the weakest row; `absent` peers, and why."""
    yield from header()
    cold = ", ".join(dict.fromkeys(row.shape.use for row in rows if row.shape.is_cold))
    yield f"numbers   float32, medians of interleaved rounds; caches warm, cold where named: {cold or 'nowhere'}"
    yield "columns   the fused op's time; its limit's time over that, and what is most of the limit; memory at its peak"
    yield "          beyond inputs and results; every peer's time over the fused op's, the closest first"
    for name, why in absent.items():
        yield f"absent    {name}: {why}"
    if disturbed := sum(row.is_disturbed for row in rows):
        yield f"disturbed {disturbed} rows, marked !: other processes kept more than {QUIET:g} cores busy"
    for _, of_method in groupby(rows, key=lambda row: (row.mode, row.method)):
        yield ""
        yield from (row.line() for row in of_method)
    yield ""
    raced = weakest_first(rows)
    for mode, method, direction in dict.fromkeys((row.mode, row.method, row.direction) for row in rows if row.ratios):
        of_kind = [row for row in raced if (row.mode, row.method, row.direction) == (mode, method, direction)]
        mean = statistics.geometric_mean(row.closest[1].value for row in of_kind)
        yield f"{mode:<9}{method:<9}{direction:<18}{mean:.2f}x the speed of the closest peer (geometric mean)"
    if raced:
        yield f"weakest   {raced[0].line()}"


def rows_of(document: dict[str, Any]) -> list[Row]:
    """Of pytest-benchmark's JSON."""
    return [Row.from_info(benchmark["extra_info"]) for benchmark in document.get("benchmarks", ())]


def weakest_first(rows: Sequence[Row]) -> list[Row]:
    """By the ratio to the closest peer; without the rows where no peer fits in memory."""
    return sorted((row for row in rows if row.ratios), key=lambda row: row.closest[1].value)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:>9.3f} ms"
