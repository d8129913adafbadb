"""The report: its rows, what stands above them, and the table that closes the run."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

import attn_ext
from attn_ext import backend
from benchmarks.implementations import FUSED
from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Row:
    """Median seconds by implementation, the fused op's first."""

    method: str
    shape: Shape
    direction: str
    seconds: dict[str, float]

    def ratio(self, peer: str) -> float:
        """How many times as long the peer takes."""
        return self.seconds[peer] / self.seconds[FUSED.name]

    def extra_info(self) -> dict[str, object]:
        """What pytest-benchmark's JSON keeps beside the fused op's own timing."""
        peers = [name for name in self.seconds if name != FUSED.name]
        return {
            "method": self.method,
            "use": self.shape.use,
            "B,T,S,H": self.shape.sizes,
            "direction": self.direction,
            "median_seconds": self.seconds,
            "ratio": {peer: self.ratio(peer) for peer in peers},
        }


def settings() -> dict[str, str]:
    """What every number below depends on."""
    facts = backend.build_facts() or {}
    return {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {torch.ops.attn_ext.cpu_capability()} kernels",
        "software": f"PyTorch {torch.__version__}, Python {platform.python_version()}, attn_ext {attn_ext.__version__}",
        "build": ", ".join(f"{name}: {value}" for name, value in facts.items()),
        "numbers": "float32, with weights; medians of interleaved rounds; ratio: the peer's time over the fused op's",
    }


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The settings, a table of all rows, and each method's ratios in one line."""
    for name, text in settings().items():
        yield f"{name:<10}{text}"
    peers = [name for name in rows[0].seconds if name != FUSED.name]
    yield ""
    yield f"{'method':<9}{'use':<24}{'(B,T,S,H)':<18}{'direction':<18}{FUSED.name:>12}" + "".join(
        f"{peer:>12}{'ratio':>8}" for peer in peers
    )
    for method, of_method in groupby(rows, key=lambda row: row.method):
        yield ""
        for row in of_method:
            sizes = f"({','.join(map(str, row.shape.sizes))})"
            yield (
                f"{method:<9}{row.shape.use:<24}{sizes:<18}{row.direction:<18}{_time(row.seconds[FUSED.name])}"
                + "".join(f"{_time(row.seconds[peer])}{row.ratio(peer):>7.2f}x" for peer in peers)
            )
    yield ""
    for method, of_method in groupby(rows, key=lambda row: row.method):
        by_direction = sorted(of_method, key=lambda row: row.direction)
        for direction, of_direction in groupby(by_direction, key=lambda row: row.direction):
            yield f"{method:<9}{direction:<18}{_summary(list(of_direction), peers)}"


def _summary(rows: list[Row], peers: Sequence[str]) -> str:
    weakest = {peer: min(rows, key=lambda row, peer=peer: row.ratio(peer)) for peer in peers}
    return "; ".join(
        f"{statistics.geometric_mean(row.ratio(peer) for row in rows):.2f}x the speed of the {peer} (geometric mean), "
        f"least {weakest[peer].ratio(peer):.2f}x: {weakest[peer].shape.use}"
        for peer in peers
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:>9.3f} ms"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
