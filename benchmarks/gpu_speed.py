"""Speed on the GPU beside its floor and its peers: `python -m benchmarks.gpu_speed --json FILE --minutes M`.

A call's floor is the time of the most that it asks of any one unit: bytes, matrix products, special functions,
instructions. Every number is a median over replays of a CUDA graph that makes the call on one input set after another,
more of them than the L2 cache holds; "called" is the same without a graph, with the cost of its launches.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from benchmarks import implementations
from benchmarks.implementations import Problem
from benchmarks.shapes import Shape

SECONDS_A_NUMBER = 0.1
COMPILE_SECONDS = 30.0  # what torch.compile with its autotuning may take, about

Attend = Callable[..., Tensor]  # (query, memory, keys=, v=) -> context


@dataclass(frozen=True)
class Ceilings:
    """What the GPU does a second: a copy's bytes, a product's operations by dtype, special functions, instructions."""

    bytes: float
    products: dict[str, float]
    special: float
    instructions: float


@dataclass(frozen=True)
class Workload:
    method: str  # "dot" or "additive"
    sizes: tuple[int, int, int, int]  # B, T, S, H
    direction: str  # "forward" or "backward"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.method} {self.sizes} {self.direction} {self.dtype}"

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """The fewest: each input read once, each result written once. Weights are not asked for."""
        B, T, S, H = self.sizes
        memories = 1 if self.method == "dot" else 2  # keys and values
        forward = B * H * (2 * T + memories * S)
        return (forward if self.direction == "forward" else 2 * B * H * (T + memories * S) + B * T * H) * self.itemsize

    def floor(self, ceilings: Ceilings) -> dict[str, float]:
        """Seconds by unit."""
        B, T, S, H = self.sizes
        elements = B * T * S * H
        backward = self.direction == "backward"
        products = (8 if backward else 4) * elements
        seconds = {"memory": self.bytes / ceilings.bytes}
        if self.method == "additive":
            products /= 2
            # The floor that was asked for: two features to a reciprocal, though the kernel has four. A backward's
            # multiply-adds are the more: seven to an element.
            seconds["special functions"] = elements / 2 / ceilings.special
            if backward:
                seconds["instructions"] = 7 * elements / ceilings.instructions
        if T > 1:
            seconds["products"] = products / ceilings.products[self.dtype]
        return seconds

    @property
    def wanted_share(self) -> float | None:
        """Of the floor, where one is asked for."""
        if self.sizes[1] == 1:
            return 0.85 if self.direction == "forward" else 0.80
        return 0.80 if self.method == "additive" and self.direction == "forward" else None


MAIN = ((64, 1, 512, 1024), (32, 128, 128, 512), (8, 1024, 1024, 1024))


def workloads() -> list[Workload]:
    """The ones of most worth first."""
    found = [
        Workload(method, sizes, direction)
        for sizes in MAIN
        for method in ("dot", "additive")
        for direction in ("forward", "backward")
    ]
    for size in (128, 256, 512, 1024):
        for sizes in ((64, 1, 512, size), (32, 128, 128, size)):
            for method in ("dot", "additive"):
                for direction in ("forward", "backward"):
                    found.append(Workload(method, sizes, direction))
    found += [Workload(each.method, each.sizes, each.direction, "float32") for each in found[:8]]
    return list(dict.fromkeys(found))


@dataclass
class Row:
    """A workload's floor, and seconds by who did it; `missing` says why somebody has none."""

    workload: Workload
    floor: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    called: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        bound = max(self.floor, key=self.floor.__getitem__)
        fused = self.seconds.get("fused")
        return {
            "method": self.workload.method,
            "sizes": self.workload.sizes,
            "direction": self.workload.direction,
            "dtype": self.workload.dtype,
            "floor": self.floor,
            "bound": bound,
            "share": None if fused is None else self.floor[bound] / fused,
            "wanted": self.workload.wanted_share,
            "seconds": self.seconds,
            "called": self.called,
            "missing": self.missing,
        }


# Those who do it.


def fused(query: Tensor, memory: Tensor, keys: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    if keys is None:
        return attn_ext.dot_attention(query, memory, need_weights=False)[0]
    return attn_ext.additive_attention(query, keys, v, memory, need_weights=False)[0]


def fused_with_weights(query: Tensor, memory: Tensor, keys: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    """As calls are if nobody asks for less: the weights are kept, and the backward does not take them anew."""
    if keys is None:
        return attn_ext.dot_attention(query, memory)[0]
    return attn_ext.additive_attention(query, keys, v, memory)[0]


def eager(query: Tensor, memory: Tensor, **parameters: Tensor) -> Tensor:
    return implementations.eager(query, memory, "", need_weights=False, **parameters)[0]


def for_the_compiler(query: Tensor, memory: Tensor, **parameters: Tensor) -> Tensor:
    return implementations.eager(query, memory, "", need_weights=False, sum_of_products=True, **parameters)[0]


def sdpa(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, memory: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return implementations.sdpa(query, memory, "dot")[0]

    return attend


def triton_tanh_approx(query: Tensor, memory: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """What a good hand would write without reciprocals: one tanh.approx an element."""
    from benchmarks.gpu_triton import additive_scores

    return torch.bmm(torch.softmax(additive_scores(query, keys, v), dim=-1).to(memory.dtype), memory)


def contestants(workload: Workload) -> Iterator[tuple[str, Callable[[], Attend], float]]:
    """Name, how to come by it, and the seconds that may take; the fused op first."""
    yield "fused", lambda: fused, 0.0
    if workload.direction == "backward" and workload.sizes[1] > 1:
        yield "fused, weights kept", lambda: fused_with_weights, 0.0
    yield "eager", lambda: eager, 0.0
    if workload.method == "dot":
        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            if hasattr(SDPBackend, backend):
                name = f"SDPA {backend.split('_')[0].lower()}"
                yield name, partial(sdpa, getattr(SDPBackend, backend)), 0.0
    elif workload.direction == "forward":
        yield "Triton, tanh.approx", lambda: triton_tanh_approx, 10.0
    if workload.sizes in MAIN:
        yield "compiled", compiled, COMPILE_SECONDS


def compiled() -> Attend:
    torch._dynamo.reset()
    return torch.compile(for_the_compiler, mode="max-autotune-no-cudagraphs", dynamic=False)


# How they are timed.


def input_sets(workload: Workload, cache_bytes: int) -> int:
    """So many that a set's turn comes when it has long left the cache."""
    return min(max(math.ceil(3 * cache_bytes / workload.bytes), 2), 64)


@lru_cache(maxsize=1)
def problem_of(method: str, sizes: tuple[int, int, int, int], dtype: str) -> Problem:
    """Made once for all who solve it, one after the other."""
    return Problem(method, Shape("", *sizes), getattr(torch, dtype))


def prepared_calls(workload: Workload, attend: Attend, sets: int, device: str) -> list[Callable[[], object]]:
    """One for each input set. A backward's forward has then been made."""
    problem = problem_of(workload.method, workload.sizes, workload.dtype)
    there = {name: x.to(device) for name, x in problem.inputs.items()}
    calls: list[Callable[[], object]] = []
    for _ in range(sets):
        inputs = {name: x.clone() for name, x in there.items()}
        if workload.direction == "forward":
            calls.append(torch.no_grad()(partial(attend, **inputs)))
        else:
            leaves = [x.requires_grad_() for x in inputs.values()]
            context = attend(**inputs)
            grad = problem.grad_context.to(device)
            calls.append(partial(torch.autograd.grad, context, leaves, grad, retain_graph=True))
    return calls


def timed(run: Callable[[], object], each: int) -> float:
    """The median of seconds a call, of which one `run` makes `each`."""
    run()
    torch.cuda.synchronize()
    samples: list[float] = []
    end = time.perf_counter() + SECONDS_A_NUMBER
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / each)
        if samples[0] > 1:
            break  # a minute's work is no median's
    return statistics.median(samples)


def seconds_of(workload: Workload, attend: Attend, cache_bytes: int) -> tuple[float, float, list[Tensor]]:
    """Graph-replayed, called, and the results to compare: the context, or every gradient."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    sets = input_sets(workload, cache_bytes)
    with torch.cuda.stream(stream):  # a backward runs on its forward's stream, which has to be the captured one
        calls = prepared_calls(workload, attend, sets, "cuda")
        for call in calls[:2]:
            result = call()
        called = timed(lambda: [call() for call in calls], sets)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                kept.append(call())  # so that results, too, go to fresh memory
        replayed = timed(graph.replay, sets)
    torch.cuda.synchronize()
    results = [result] if isinstance(result, Tensor) else result
    return replayed, called, [each.detach().clone() for each in results]


def measure_ceilings() -> Ceilings:
    properties = torch.cuda.get_device_properties(0)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / timed(partial(target.copy_, source), 1)
    del source, target
    products = {}
    for name, size in (("bfloat16", 8192), ("float32", 4096)):
        a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, name)) for _ in range(2))
        products[name] = 2 * size**3 / timed(partial(torch.mm, a, b), 1)
    cycles = clock() * properties.multi_processor_count
    return Ceilings(copied, products, 16 * cycles, 128 * cycles)


def clock() -> float:
    """The multiprocessors' cycles a second, at most."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return float(said.split()[0]) * 1e6
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return getattr(torch.cuda.get_device_properties(0), "clock_rate", 1.98e6) * 1e3


def wrong(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Two lists of one problem's results in halves; tanh.approx is as good as these."""
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        error = ((result.double() - wanted.double()).norm() / wanted.double().norm()).item()
        if not error < 3e-2:
            return f"result {i} differs from the fused op's by {error:.1e} of its size"
    return None


def rank(workload: Workload, cost: float) -> int:
    """Who comes first while there is time: the main shapes, then those that say how it goes on, then what compiles."""
    if workload.sizes in MAIN and workload.dtype == "bfloat16" and cost < COMPILE_SECONDS:
        return 0
    return 1 if cost < COMPILE_SECONDS else 2


def measure(rows: Sequence[Row], cache_bytes: int, deadline: float, save: Callable[[], None]) -> None:
    """Everybody's numbers while there is time."""
    expected: dict[Workload, list[Tensor]] = {}
    turns = [(row, name, make, cost) for row in rows for name, make, cost in contestants(row.workload)]
    for row, name, make, cost in sorted(turns, key=lambda turn: rank(turn[0].workload, turn[3])):
        if time.perf_counter() + cost > deadline:
            row.missing[name] = "the time was over"
            continue
        try:
            seconds, called, results = seconds_of(row.workload, make(), cache_bytes)
            if name == "fused":
                expected[row.workload] = results
            elif row.workload in expected and (reason := wrong(results, expected[row.workload])):
                row.missing[name] = reason
                continue
            row.seconds[name], row.called[name] = seconds, called
        except Exception as error:  # whatever a peer cannot do is a line of the report
            row.missing[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:100]
            torch.cuda.empty_cache()
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=3.0, metavar="M")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + 60 * arguments.minutes
    attn_ext.use_backend("fused")
    ceilings = measure_ceilings()
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    rows = [Row(each, each.floor(ceilings)) for each in workloads()]

    def save() -> None:
        data = {"ceilings": vars(ceilings), "L2 bytes": cache_bytes, "rows": [row.to_json() for row in rows]}
        arguments.json.write_text(json.dumps(data, indent=1))

    save()
    measure(rows, cache_bytes, deadline, save)
    save()


if __name__ == "__main__":
    main()
