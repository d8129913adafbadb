"""A decoder's training step on the GPU with each attention and without: `python -m benchmarks.gpu_steps --json FILE`.

A step is T cells, attentions and output layers, forward and backward, captured into one CUDA graph: launched one by
one, what a training step takes is the time of Python's calls, whatever the kernels do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoder import DecoderLoop
from benchmarks.implementations import EAGER, FUSED
from benchmarks.shapes import Shape

SHAPES = ((64, 30, 30, 256), (64, 50, 50, 512), (16, 50, 400, 512))
METHODS = ("dot", "general", "concat")
SECONDS_A_NUMBER = 0.15


@dataclass
class Steps:
    """One shape's seconds: without attention, and with it by who has it and its method."""

    sizes: tuple[int, int, int, int]
    dtype: str
    none: float | None = None
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def replayed(step: Callable[[], object]) -> float:
    """The median of seconds of a step's graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # to allocate and to choose what products there are
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = step()
        samples: list[float] = []
        end = time.perf_counter() + SECONDS_A_NUMBER
        while len(samples) < 5 or time.perf_counter() < end:
            begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples.append(begin.elapsed_time(stop) / 1e3)
    del kept
    return statistics.median(samples)


def measure(
    rows: Sequence[Steps], deadline: float, save: Callable[[], None], make: Callable[..., Callable[[], object]]
) -> None:
    """Ours at every shape first, then the peer's, while there is time."""
    turns = [("none", "dot"), *((FUSED.name, method) for method in METHODS)]
    for of_turn in (turns, [(EAGER.name, method) for method in METHODS]):
        for row in rows:
            for who, method in of_turn:
                if time.perf_counter() > deadline:
                    row.missing[f"{who} {method}"] = "the time was over"
                    continue
                try:
                    seconds = replayed(make(who, method, Shape("", *row.sizes), getattr(torch, row.dtype)))
                except Exception as error:  # whatever somebody cannot do is a line of the report
                    row.missing[f"{who} {method}"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                    torch.cuda.empty_cache()
                    continue
                if who == "none":
                    row.none = seconds
                else:
                    row.seconds.setdefault(who, {})[method] = seconds
                save()


def on_gpu(who: str, method: str, shape: Shape, dtype: torch.dtype) -> DecoderLoop:
    return DecoderLoop(who, method, shape, dtype=dtype, device="cuda")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "Training steps of a GRU decoder, stepwise, V=2000, a CUDA graph each: milliseconds without attention, and the "
        "time with it over that without, the fused op's and eager's.",
        "",
        "| (B, T, S, H) | dtype | no attention | " + " | ".join(METHODS) + " |",
        "|---|---|---|" + "---|" * len(METHODS),
    ]
    for row in rows:
        cells = []
        for method in METHODS:
            both = [row["seconds"].get(who, {}).get(method) for who in (FUSED.name, EAGER.name)]
            cells.append(", ".join(f"{each / row['none']:.2f}x" if each and row["none"] else "-" for each in both))
        none = f"{row['none'] * 1e3:.2f}" if row["none"] else "-"
        lines.append(f"| {tuple(row['sizes'])} | {row['dtype']} | {none} | {' | '.join(cells)} |")
    missing = [f"{tuple(row['sizes'])}, {name}: {why}" for row in rows for name, why in row["missing"].items()]
    return [*lines, *([""] if missing else []), *missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=1.5, metavar="M")
    arguments = parser.parse_args()
    rows = [Steps(sizes, dtype) for dtype in ("bfloat16", "float32") for sizes in SHAPES]

    def save() -> None:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1))

    measure(rows, time.perf_counter() + 60 * arguments.minutes, save, on_gpu)
    save()


if __name__ == "__main__":
    main()
