"""The performance targets as ratios from one run, with a verdict for each: `python -m benchmarks.targets`.

 1  additive scores, many queries: shares of the prototype's inner loops, speed-ups, peak memory
 2  dot and general, many queries: shares of the multiply-add peak, speed-ups
 3  one query against a memory larger than the caches: shares of the memory's bandwidth
 4  a decoder's training step, step by step: its time over that of the same decoder without attention
 5  the grid: no shape where a peer that returns the same results wins
 6  bfloat16 and float16: not slower than float32, nor than eager code in the same type
 7  the cost of a call

A share is of a limit that was timed in the same rounds (benchmarks/limits.py): on a shared machine both suffer alike.
Shares are taken in pages that the C library keeps from call to call, speed-ups over peers as PyTorch allocates.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attn_ext
from attn_ext import backend
from benchmarks import grid, limits, peak_memory, report, resident_size
from benchmarks.decoder import ATTENTIONS, GRU, DecoderLoop, Kind
from benchmarks.implementations import (
    COMPILED,
    DIRECTIONS,
    EAGER,
    FUSED,
    OPS,
    REFERENCE,
    SDPA,
    Call,
    Implementation,
    Problem,
)
from benchmarks.machine import available_memory
from benchmarks.report import Finding
from benchmarks.shapes import (
    ADDITIVE,
    GRID,
    GRID_COMPILED,
    GRID_SAMPLE,
    HALVES,
    LARGE_MEMORY,
    MANY_QUERIES,
    RESIDENT_SIZE,
    TRAINING_STEPS,
    Shape,
    unnamed,
)
from benchmarks.timing import ROUNDS, SECONDS_PER_ROW, Ratio, Schedule, Timed, check, interleave, kept_pages

TOO_SLOW = 1.0  # seconds: a peer's call that takes longer is timed once
QUICK = Schedule(0.05, range(3, 11), TOO_SLOW)
MEMORY_STEPS = (25, 50, 100, 200, 400, 700, 1000)  # T = S of the curve of peak memory


class Document:
    """The results so far, in a file where one was named. A later run of this commit and settings goes on with it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "settings": report.settings(),
            "limits": {},
            "findings": [],
            "memory": [],
            "resident": [],
            "grid": [],
        }
        if path is not None and path.exists():
            try:
                found = report.read(path)
            except report.NotARecordError as error:
                sys.exit(str(error))
            if found.get("settings") != self.data["settings"]:
                sys.exit(
                    f"{path} holds the results of another commit, machine or setting: remove it or name another file"
                )
            self.data = found

    def save(self) -> None:
        if self.path is not None:
            unfinished = self.path.with_name(f"{self.path.name}.unfinished")
            unfinished.write_text(json.dumps(self.data, indent=1))
            unfinished.replace(self.path)

    def begin(self, target: int) -> None:
        """Takes back what an earlier run found for it."""
        self.data["findings"] = [each for each in self.data["findings"] if each["target"] != target]

    def add(self, kind: str, item: dict[str, Any]) -> None:
        self.data[kind].append(item)
        self.save()


@dataclass(frozen=True)
class Run:
    """How to measure: `quick` takes the first shape of each list and leaves torch.compile out."""

    document: Document
    schedule: Schedule
    quick: bool = False
    whole_grid: bool = False
    minutes: float = math.inf  # for the grid

    @property
    def of_limits(self) -> Schedule:
        """For the fused op beside probes: it has no peers there, however long it takes."""
        return replace(self.schedule, too_slow=math.inf)

    @property
    def warm(self) -> Run:
        """For what multiplies all the time: its limits know no memory, and what it reads is often just written."""
        return replace(self, schedule=replace(self.schedule, warm=True))

    def of(self, shapes: Sequence[Shape]) -> Sequence[Shape]:
        return shapes[:1] if self.quick else shapes


def additive(run: Run) -> Iterator[Finding]:
    """Target 1."""
    for shape in run.of(ADDITIVE):
        problem = Problem("additive", shape)
        grid.check_results(problem.method, shape, (FUSED, EAGER))
        passes = [Call(FUSED, problem, direction, name=direction) for direction in ("forward", "backward")]
        probes = [limits.probe(f"additive {each.name}") for each in passes]
        seconds = _beside_limits(run.warm, [*passes, *probes])
        for each, probe, wanted in zip(passes, probes, (0.85, 0.80), strict=True):
            work = {f"share of the {probe.name} loop": (probe, shape.elements, wanted)}
            yield from _shares(1, "additive", each.direction, shape, each.name, work, seconds)
        for direction, wanted in zip(DIRECTIONS, ({"compiled": 20.0}, {"eager": 100.0, "compiled": 40.0}), strict=True):
            peers = _affordable(run, (EAGER, COMPILED), problem, direction)
            yield from _speed_ups(1, run, problem, direction, peers, wanted)
    yield from _peak_memory(run)


def _peak_memory(run: Run) -> Iterator[Finding]:
    """The curve over T = S, measured where it fits and computed beyond, and what is asked of its end."""
    B, A = (2, 64) if run.quick else (32, 512)
    run.document.data["memory"] = []
    for steps in run.of(MEMORY_STEPS) if run.quick else MEMORY_STEPS:
        shape = Shape("", B, steps, steps, A)
        for implementation in (FUSED, EAGER):
            computed = implementation.peak_bytes("additive", shape, "forward+backward")
            measured = None
            if computed < available_memory() / 2:
                call = Call(implementation, Problem("additive", shape), "forward+backward")
                measured = peak_memory.extra_bytes(call)
            point = {
                "implementation": implementation.name,
                "sizes": shape.sizes,
                "computed": computed,
                "measured": measured,
            }
            run.document.add("memory", point)
            if measured is not None and implementation is FUSED:
                fused = measured
    one_pass = 4 * B * 2 * steps * A  # bytes of [B, T + S, A]
    text = f"peak memory {fused / 1e6:.0f} MB (eager {computed / 1e9:.0f} GB), of B(T+S)A"
    yield Finding(1, "additive", "forward+backward", shape, text, "x", _exactly(fused / one_pass), 2.0, at_most=True)


def many_queries(run: Run) -> Iterator[Finding]:
    """Target 2."""
    peak, gemm = limits.probe("multiply-add"), limits.probe("gemm")
    for shape in run.of(MANY_QUERIES):
        for method in ("dot", "general"):
            problem = Problem(method, shape)
            grid.check_results(problem.method, shape, (FUSED, EAGER, SDPA))
            B, T, _, D = shape.sizes
            projection = 2 * B * T * D * D if method == "general" else 0
            # A backward pass without the weights takes the scores again; the projection has two products there.
            products = {("forward", True): 4, ("forward", False): 4, ("backward", True): 8, ("backward", False): 10}
            calls = {
                key: Call(FUSED, problem, *key, name=f"{key[0]}, {'weights' if key[1] else 'no weights'}")
                for key in products
            }
            seconds = _beside_limits(run.warm, [*calls.values(), peak, gemm])
            for (direction, need_weights), count in products.items():
                flops = count * shape.elements + projection * (2 if direction == "backward" else 1)
                text = f"share of the multiply-add peak, {'weights' if need_weights else 'no weights'}"
                work = {text: (peak, flops, 0.85)}
                yield from _shares(2, method, direction, shape, calls[direction, need_weights].name, work, seconds)
            ratio = Ratio.of(seconds[peak.name], seconds[gemm.name], gemm.amount / peak.amount)
            yield Finding(2, "torch.mm", "", shape, "share of the multiply-add peak", "%", ratio, None)
            # Under half, the BLAS leaves the machine's widest vectors unused: there is something to win.
            wanted = 2.0 if ratio.value < 0.5 else 1.0
            for direction in DIRECTIONS:
                for need_weights in (True, False):
                    peers = _affordable(run, (EAGER, SDPA, COMPILED), problem, direction, need_weights)
                    yield from _speed_ups(2, run, problem, direction, peers, {"best": wanted}, need_weights)


def large_memory(run: Run) -> Iterator[Finding]:
    """Target 3."""
    copy, fresh = limits.probe("copy"), limits.probe("copy to fresh pages")
    for shape in run.of(LARGE_MEMORY):
        for method in OPS:
            problem = Problem(method, shape)
            grid.check_results(problem.method, shape, (FUSED, EAGER, SDPA))
            passes = [Call(FUSED, problem, direction, name=direction) for direction in ("forward", "backward")]
            read, copy_of_rows, seconds = _beside_its_memory(run, problem, passes)
            bytes_read = len(_rows_of(problem)) * shape.memory_bytes
            work = {"share of the read bandwidth": (read, bytes_read, 0.85)}
            yield from _shares(3, method, "forward", shape, "forward", work, seconds)
            work = {"share of read + write": (copy_of_rows, 2 * bytes_read, 0.80)}
            yield from _shares(3, method, "backward", shape, "backward", work, seconds)
            # As PyTorch allocates: every large gradient is a new mapping, and most of the time is its first touch.
            seconds = interleave([passes[1], copy, fresh], run.of_limits)
            work = {
                "share of read + write, as allocated": (copy, 2 * bytes_read, None),
                "share of torch.clone, as allocated": (fresh, 2 * bytes_read, None),
            }
            yield from _shares(3, method, "backward", shape, "backward", work, seconds)
            for direction in DIRECTIONS:
                peers = _affordable(run, (EAGER, SDPA, COMPILED), problem, direction)
                yield from _speed_ups(3, run, problem, direction, peers, {"best": 1.0})


def _rows_of(problem: Problem) -> list[str]:
    """The inputs that are read once, and whose gradients are written once: memory, and its keys where it has some."""
    return [name for name in ("memory", "keys") if name in problem.inputs]


def _beside_its_memory(
    run: Run, problem: Problem, passes: Sequence[Call]
) -> tuple[limits.Probe, limits.Probe, dict[str, list[float]]]:
    """Forward and backward beside reading what they read, and beside copying it to such gradients as they write."""
    backward = passes[1]
    with backward.active():
        # Of a mapping of their own, made outside of the pages that are kept, they leave no hole there for later ones.
        gradients = dict(zip(problem.inputs, backward(), strict=True))
    tensors = [problem.inputs[name] for name in _rows_of(problem)]
    read = limits.read_of(tensors)
    copy = limits.copy_of(tensors, [gradients[name] for name in _rows_of(problem)])
    with kept_pages():
        return read, copy, interleave([*passes, read, copy], run.of_limits)


def training_steps(run: Run) -> Iterator[Finding]:
    """Target 4."""
    feeding = Kind("LSTM", input_feeding=True)
    small = unnamed((4, 3, 5, 16))
    decoders = [(shape, GRU) for shape in (small if run.quick else TRAINING_STEPS)]
    decoders.append((small[0] if run.quick else TRAINING_STEPS[1], feeding))
    for shape, kind in decoders:
        for method in ("dot", "general", "concat"):
            steps = {name: DecoderLoop(name, method, shape, kind=kind) for name in ATTENTIONS}
            reference = steps.pop(REFERENCE.name)
            for name in (FUSED.name, EAGER.name):
                check(steps[name], reference)
            schedule = replace(run.schedule, seconds=3 * run.schedule.seconds, too_slow=4 * TOO_SLOW)
            seconds = interleave(list(steps.values()), schedule)
            wanted = 1.10
            if shape == TRAINING_STEPS[2]:
                wanted = 1.5 if method == "concat" else 1.3
            for name, limit in ((FUSED.name, wanted), (EAGER.name, None)):
                ratio = Ratio.of(seconds[name], seconds["none"])
                text = f"{name}: time over that without attention"
                yield Finding(4, method, str(kind), shape, text, "x", ratio, limit, True, _medians(seconds))
    run.document.data["resident"] = []
    for method in ("dot", "general", "concat"):
        for kind in (GRU, feeding):
            yield _gradient_difference(method, small[0] if run.quick else TRAINING_STEPS[0], kind)
        if method == "dot" or not run.quick:
            yield from _resident_size(run, method)


def _gradient_difference(method: str, shape: Shape, kind: Kind) -> Finding:
    fused, eager = (
        DecoderLoop(name, method, shape, kind=kind, dtype=torch.float64)() for name in (FUSED.name, EAGER.name)
    )
    # No gradient arrives at a part that the attention has and a method does not use.
    pairs = [(a, b) for a, b in zip(fused, eager, strict=True) if a is not None and b is not None]
    largest = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    text = "gradients against eager's, in float64"
    return Finding(4, method, str(kind), shape, text, "e", _exactly(largest), 1e-12, True)


def _resident_size(run: Run, method: str) -> Iterator[Finding]:
    shape = unnamed((2, 2, 3, 8))[0] if run.quick else RESIDENT_SIZE
    sizes = resident_size.curve(FUSED.name, method, shape)
    if sizes:
        run.document.add("resident", {"method": method, "sizes": shape.sizes, "bytes": sizes})
        # Whatever the allocator keeps for itself, it has after a tenth of the steps.
        begin = max(sizes[: len(sizes) // 10])
        text = f"resident size of {resident_size.STEPS} training steps over 100"
        yield Finding(4, method, str(GRU), shape, text, "x", _exactly(max(sizes) / begin), 1.02, True)


def shapes_of_the_grid(run: Run) -> Iterator[Finding]:
    """Target 5: no findings but the count of lost cells; the cells go to the document as they come."""
    shapes = run.of(GRID if run.whole_grid else GRID_SAMPLE)
    schedule = Schedule(run.schedule.seconds / 4, range(3, run.schedule.rounds[-1] + 1), run.schedule.too_slow)
    minutes = grid.estimate(shapes, schedule) / 60
    which = "the whole grid" if run.whole_grid else f"{len(shapes)} of its {len(GRID)} shapes (--grid: all)"
    print(
        f"  {which}, {len(shapes) * len(OPS) * len(DIRECTIONS)} cells, about {minutes:.0f} minutes where all are new;"
    )
    print(f"  torch.compile at {', '.join(each.label for each in GRID_COMPILED if each in shapes)}")
    done = map(grid.Cell.from_json, run.document.data["grid"])
    cells = grid.measure(
        shapes, schedule, done, lambda cell: run.document.add("grid", cell.to_json()), minutes=run.minutes
    )
    missing = len(shapes) * len(OPS) * len(DIRECTIONS) - len(cells)
    if missing:
        print(f"  {missing} cells, the largest, are left for a later run: the time is over")
    for line in grid.summary(cells):
        print(line)
    for cell in cells:
        if cell.worst and (cell.is_lost or not run.whole_grid):
            peer, ratio = cell.worst
            shape = Shape("", cell.B, cell.T, cell.S, cell.D)
            text = f"speed-up over {peer}"
            yield Finding(5, cell.method, cell.direction, shape, text, "x", ratio, 1.0, seconds=cell.seconds)


def halves(run: Run) -> Iterator[Finding]:
    """Target 6."""
    for shape in run.of(HALVES):
        for method in OPS:
            for direction in DIRECTIONS:
                for dtype in (torch.bfloat16, torch.float16):
                    problem = Problem(method, shape, dtype)
                    reference = Call(REFERENCE, Problem(method, _small(shape), dtype), direction)
                    check(Call(FUSED, Problem(method, _small(shape), dtype), direction), reference)
                    calls = [
                        Call(FUSED, problem, direction),
                        Call(FUSED, Problem(method, shape), direction, name="fused float32"),
                        Call(EAGER, problem, direction),
                    ]
                    seconds = interleave(calls, run.warm.schedule)
                    name = str(dtype).removeprefix("torch.")
                    for peer in ("fused float32", "eager"):
                        ratio = Ratio.of(seconds[peer], seconds[FUSED.name])
                        text = f"{name}: speed-up over {peer}"
                        yield Finding(6, method, direction, shape, text, "x", ratio, 1.0, seconds=_medians(seconds))


@dataclass(frozen=True)
class _BareOp:
    """The registered op, without the public function's checks."""

    query: Tensor
    memory: Tensor
    name: str = "bare op"
    active: Callable[[], Any] = FUSED.active

    def __call__(self) -> object:
        return torch.ops.attn_ext.attention.default(
            self.query, self.memory, None, None, None, None, None, 1.0, True, [False, False]
        )


@dataclass(frozen=True)
class _PublicCall:
    """attn_ext.dot_attention, as a user calls it."""

    query: Tensor
    memory: Tensor
    name: str = "public call"
    active: Callable[[], Any] = FUSED.active

    def __call__(self) -> object:
        return attn_ext.dot_attention(self.query, self.memory)


def call_overhead(run: Run) -> Iterator[Finding]:
    """What issue 3 calls overhead: microseconds, in batches of calls."""
    (shape,) = unnamed((1, 1, 24, 128))
    problem = Problem("dot", shape)
    calls = [_BareOp(**problem.inputs), _PublicCall(**problem.inputs)]
    with torch.inference_mode():
        seconds = interleave(calls, run.schedule)
    ratio = Ratio.of(seconds["public call"], seconds["bare op"])
    text = f"public call ({statistics.median(seconds['public call']) * 1e6:.1f} us) over the bare op"
    yield Finding(7, "dot", "inference", shape, text, "x", ratio, 1.5, True, _medians(seconds))
    grid.check_results(problem.method, shape, (FUSED, EAGER))
    for direction in DIRECTIONS:
        yield from _speed_ups(7, run, problem, direction, (EAGER,), {"eager": 1.0})


TARGETS = {
    1: ("additive, many queries", additive),
    2: ("dot and general, many queries", many_queries),
    3: ("one query, memory larger than the caches", large_memory),
    4: ("a decoder's training step, step by step", training_steps),
    5: ("never slower: the grid", shapes_of_the_grid),
    6: ("bfloat16 and float16", halves),
    7: ("the cost of a call", call_overhead),
}


def _small(shape: Shape) -> Shape:
    """What the reference can compute in a second."""
    B, T, S, H = shape.sizes
    return Shape(shape.use, min(B, 4), min(T, 64), S, H)


def _affordable(
    run: Run, peers: Sequence[Implementation], problem: Problem, direction: str, need_weights: bool = True
) -> list[Implementation]:
    """Those that return the same results and fit in memory."""
    return [
        peer
        for peer in peers
        if peer.accepts(problem.method, need_weights)
        and not grid.why_skipped(peer, problem.method, problem.shape, direction)
        and not (run.quick and peer is COMPILED)
    ]


def _beside_limits(run: Run, timed: Sequence[Timed]) -> dict[str, list[float]]:
    """In kept pages: the first touch of a fresh one costs several times its traffic, and is no part of a kernel."""
    with kept_pages():
        return interleave(list(timed), run.of_limits)


def _shares(
    target: int,
    kernel: str,
    direction: str,
    shape: Shape,
    name: str,
    work: dict[str, tuple[limits.Probe, float, float | None]],
    seconds: dict[str, list[float]],
) -> Iterator[Finding]:
    """The call's rate over that of a probe, for each of `work`: measure -> probe, amount of the call, wanted share."""
    for measure, (probe, amount, wanted) in work.items():
        ratio = Ratio.of(seconds[probe.name], seconds[name], amount / probe.amount)
        medians = {each: statistics.median(seconds[each]) for each in (name, probe.name)}
        yield Finding(target, kernel, direction, shape, measure, "%", ratio, wanted, seconds=medians)


def _speed_ups(
    target: int,
    run: Run,
    problem: Problem,
    direction: str,
    peers: Sequence[Implementation],
    wanted: dict[str, float],
    need_weights: bool = True,
) -> Iterator[Finding]:
    """Every peer's time over the fused call's; `wanted` by peer, or of the "best" alone."""
    calls: list[Timed] = [Call(each, problem, direction, need_weights) for each in (FUSED, *peers)]
    seconds = interleave(calls, run.schedule)
    medians = _medians(seconds)
    names = [peer.name for peer in peers]
    if "best" in wanted:
        names = [min(names, key=medians.__getitem__)]
        wanted = {names[0]: wanted["best"]}
    for name in names:
        text = f"speed-up over {name}{'' if need_weights else ', no weights'}"
        ratio = Ratio.of(seconds[name], seconds[FUSED.name])
        yield Finding(
            target, problem.method, direction, problem.shape, text, "x", ratio, wanted.get(name), seconds=medians
        )


def _rate(probe: limits.Probe, seconds: dict[str, list[float]]) -> float:
    return probe.amount / statistics.median(seconds[probe.name])


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


def _exactly(value: float) -> Ratio:
    return Ratio(value, value, value)


def measure_limits(run: Run) -> dict[str, dict[str, Any]]:
    """Every limit by name: its median and best rate a second, in `unit`."""
    probes = [limits.probe(name) for name in limits.NAMES]
    seconds = interleave(probes, run.schedule)
    return {
        probe.name: {
            "rate": _rate(probe, seconds),
            "best": probe.amount / min(seconds[probe.name]),
            "unit": probe.unit,
        }
        for probe in probes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=TARGETS, default=list(TARGETS), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results; the same run goes on with them")
    parser.add_argument("--quick", action="store_true", help="a few rounds at one shape a target: to see it run")
    parser.add_argument("--grid", action="store_true", help="target 5 over the whole grid, not a sample")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="for the grid; smallest shapes first"
    )
    parser.add_argument("--seconds-per-row", type=float, default=SECONDS_PER_ROW, metavar="S")
    precisions = ("highest", "high", "medium")
    parser.add_argument("--precision", choices=precisions, default="highest", help="PyTorch's, of float32 products")
    arguments = parser.parse_args()
    if not arguments.seconds_per_row > 0 or not arguments.minutes > 0:
        parser.error("--seconds-per-row and --minutes must be positive")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")

    torch.set_float32_matmul_precision(arguments.precision)
    if problem := backend.unavailable():
        sys.exit(f"there is nothing to measure: {problem}")
    schedule = QUICK if arguments.quick else Schedule(arguments.seconds_per_row, ROUNDS, TOO_SLOW)
    run = Run(Document(arguments.json), schedule, arguments.quick, arguments.grid, arguments.minutes)
    for line in report.header():
        print(line)
    try:
        run.document.data["limits"] = measure_limits(run)
        run.document.save()
        for name, limit in run.document.data["limits"].items():
            scale, prefix = (1e3, "k") if limit["unit"] == "calls" else (1e9, "G")
            rate, best = limit["rate"] / scale, limit["best"] / scale
            print(f"  {name:<22}{rate:>8.3g} {prefix}{limit['unit']}/s, at best {best:.3g}")
        verdicts = [finding.verdict for target in arguments.only for finding in _print_target(run, target)]
    except KeyboardInterrupt:
        kept = f"; what is done is in {arguments.json}, and the same command goes on" if arguments.json else ""
        sys.exit(f"\nstopped{kept}")
    except limits.NoCompilerError as error:
        sys.exit(str(error))
    judged = [verdict for verdict in verdicts if verdict]
    print(f"\n{judged.count('reached')} of {len(judged)} targets' rows reached")


def _print_target(run: Run, target: int) -> Iterator[Finding]:
    title, measure = TARGETS[target]
    print(f"\n{target}  {title}", flush=True)
    run.document.begin(target)
    for finding in measure(run):
        print(finding.line(), flush=True)
        run.document.add("findings", asdict(finding) | {"verdict": finding.verdict})
        yield finding


if __name__ == "__main__":
    main()
