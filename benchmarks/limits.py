"""What this machine can do at most, as probes of a few milliseconds that can be timed beside what they bound.

The loops are benchmarks/limits.cpp, compiled at first use for the instruction set that the fused kernels run with, into
a folder under build/ named after its content, compiler, flags and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import torch

from attn_ext import backend
from benchmarks.machine import processor
from benchmarks.timing import sample, shuffled

SOURCE = Path(__file__).with_name("limits.cpp")
BUILD = Path(__file__).parents[1] / "build" / "limits"
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
# Those of setup.py, which cannot be imported.
FLAGS_OF_AARCH64 = ("-fno-schedule-insns",)
FLAGS_OF_CAPABILITY = {
    "default": FLAGS_OF_AARCH64 if platform.machine() == "aarch64" else (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
}
FLAGS_OF_CAPABILITY["avx512_bf16"] = (*FLAGS_OF_CAPABILITY["avx512"], "-DCPU_CAPABILITY_AVX512", "-mavx512bf16")
FLAGS_OF_CAPABILITY["avx512_amx"] = (*FLAGS_OF_CAPABILITY["avx512_bf16"], "-mamx-tile", "-mamx-bf16")

BUFFER = 1 << 29  # bytes: many last-level caches
SHARE = 1 << 14  # bytes that a thread reads or copies are a multiple of this many
WINDOW = 1 << 26  # bytes a probe goes through in one call: the next ones of the buffer, so that none is in a cache
STREAMS = ((1, 0), (2, 0), (4, 0), (1, 1024), (4, 1024))  # ways to read: pages at a time, floats prefetched ahead
STORES = ((0, 0), (0, 512), (1, 0), (1, 512))  # ways to copy: whether past the caches, floats prefetched ahead


@dataclass(frozen=True)
class Probe:
    """Calling it does `amount` of `unit` ("FLOP", "B", "elements" or "calls") once, in a few milliseconds."""

    name: str
    amount: float
    unit: str
    run: Callable[[], object]
    active: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self) -> None:
        self.run()


class NoCompilerError(RuntimeError):
    """limits.cpp cannot be compiled here; the message says why."""


@cache
def probe(name: str, capability: str | None = None) -> Probe:
    """The probe of one of `NAMES`, on as many threads as PyTorch has now; `capability` None is the running one's.

    Raises:
        NoCompilerError: limits.cpp is needed and does not compile.
    """
    return Probe(name, *_MAKERS[name](capability or running_capability(), torch.get_num_threads()))


@cache
def probe_of_size(name: str, size: int) -> Probe:
    """ "read" or "copy" of the same `size` bytes again and again, from the nearest cache that holds them.

    Raises:
        NoCompilerError: limits.cpp is needed and does not compile.
    """
    library, threads = _library(running_capability()), torch.get_num_threads()
    # A thread is not worth waking for less than two of the loops' smallest shares.
    threads = max(1, min(threads, size // (2 * SHARE)))
    size = max(size // (threads * SHARE), 1) * threads * SHARE
    source, destination = torch.ones(size // 4), torch.ones(size // 4)
    pointers = (destination.data_ptr(), source.data_ptr()) if name == "copy" else (source.data_ptr(),)
    loop, repeats = getattr(library, f"limits_{name}"), -(-WINDOW // size)

    def run(_kept: tuple[torch.Tensor, ...] = (source, destination)) -> None:
        loop(*pointers, size // 4, repeats, 1 if name == "read" else 0, 0, threads)

    traffic = {"read": 1, "copy": 2}[name] * size * repeats
    return Probe(f"{name}, {size / 1e6:.2g} MB", traffic, "B", run)


def read_of(tensors: Sequence[torch.Tensor]) -> Probe:
    """ "read" of these contiguous float32 tensors, much larger than the caches, once each.

    What memory gives depends on where it lies: this is of the pages that the call reads, which it bounds.

    Raises:
        NoCompilerError: limits.cpp is needed and does not compile.
    """
    library, threads = _library(running_capability()), torch.get_num_threads()
    size = _size_of_shares(tensors, threads)
    run = _fastest_read(library, threads, lambda: [(each.data_ptr(), each.numel()) for each in tensors])
    return Probe("read", size, "B", run)


def copy_of(tensors: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> Probe:
    """ "copy" of such tensors to others of their sizes, likewise.

    Raises:
        NoCompilerError: limits.cpp is needed and does not compile.
    """
    library, threads = _library(running_capability()), torch.get_num_threads()
    size = _size_of_shares(tensors, threads)
    if _size_of_shares(destinations, threads) != size:
        raise ValueError("the destinations of a copy are not of the sizes of what is copied")

    def spans() -> list[tuple[int, int, int]]:
        pairs = zip(destinations, tensors, strict=True)
        return [(to.data_ptr(), source.data_ptr(), source.numel()) for to, source in pairs]

    return Probe("copy", 2 * size, "B", _fastest_copy(library, threads, spans))


def _size_of_shares(tensors: Sequence[torch.Tensor], threads: int) -> int:
    """Bytes of them that the loops go through, which leave less than a share a thread."""
    for each in tensors:
        if each.dtype != torch.float32 or not each.is_contiguous() or each.nbytes < threads * SHARE:
            raise ValueError(
                f"a limit is of contiguous float32 tensors of {threads * SHARE} bytes or more, "
                f"got {list(each.shape)} of {each.dtype} with strides {each.stride()}"
            )
    return sum(each.nbytes // (threads * SHARE) * threads * SHARE for each in tensors)


def running_capability() -> str:
    """The instruction set of the fused kernels that run, one of FLAGS_OF_CAPABILITY."""
    if problem := backend.unavailable():
        raise RuntimeError(f"there is nothing to find the limits of: {problem}")
    return torch.ops.attn_ext.cpu_capability()


def compile_library(capability: str) -> Path:
    """limits.cpp for `capability` as a shared library; compiled where it is not there yet."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise NoCompilerError(
            "benchmarks/limits.cpp measures the machine's limits, and there is no C++ compiler here: "
            "put `c++` on the PATH or name one in CXX"
        )
    flags = (*FLAGS, *FLAGS_OF_CAPABILITY[capability])
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCompilerError(f"benchmarks/limits.cpp cannot be compiled: {compiler} does not run ({error})") from None
    key = hashlib.sha256("\n".join((SOURCE.read_text(), version, *flags, processor())).encode()).hexdigest()[:16]
    library = BUILD / key / f"limits-{capability}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        process = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(unfinished)], capture_output=True, text=True)
        if process.returncode != 0:
            raise NoCompilerError(f"{compiler} does not compile benchmarks/limits.cpp:\n{process.stderr}")
        unfinished.replace(library)
    return library


@cache
def _library(capability: str) -> ctypes.CDLL:
    # PyTorch's own OpenMP is loaded already and serves this library too, by its name: one pool of threads.
    library = ctypes.CDLL(str(compile_library(capability)))
    pointer, count, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, arguments in {
        "multiply_add": (count, integer),
        "additive_forward": (count, integer, integer),
        "additive_backward": (count, integer, integer),
        "read": (pointer, count, count, integer, count, integer),
        "copy": (pointer, pointer, count, count, integer, count, integer),
    }.items():
        function = getattr(library, f"limits_{name}")
        function.argtypes, function.restype = arguments, None
    for name in ("additive_forward_elements", "additive_backward_elements"):
        getattr(library, f"limits_{name}").restype = count
    return library


_Made = tuple[float, str, Callable[[], object]]


def _multiply_add(capability: str, threads: int) -> _Made:
    library, rounds = _library(capability), 1_500_000
    return (
        rounds * 12 * 2 * library.limits_lanes() * threads,
        "FLOP",
        lambda: library.limits_multiply_add(rounds, threads),
    )


def _additive_loop(direction: str, elements: int) -> Callable[[str, int], _Made]:
    def make(capability: str, threads: int) -> _Made:
        library = _library(capability)
        loop = getattr(library, f"limits_additive_{direction}")
        each = getattr(library, f"limits_additive_{direction}_elements")()
        rounds = elements // each
        places = [partial(loop, rounds, place, threads) for place in range(library.limits_places())]
        return rounds * each * threads, "elements", _fastest(places)

    return make


@cache
def _buffer(_of: str) -> torch.Tensor:
    """[BUFFER / 4] float32 in pages as PyTorch's allocator gives them, each touched by the thread that will use it."""
    return torch.ones(BUFFER // 4)


def _windows(of: str) -> Iterator[int]:
    """The addresses of the buffer's windows, round and round."""
    first = _buffer(of).data_ptr()
    return cycle(range(first, first + BUFFER, WINDOW))


def _fastest(ways: Sequence[Callable[[], object]]) -> Callable[[], object]:
    # In turns, since memory's pace changes with the moment; in any order, or each would have windows of its own.
    seconds = dict.fromkeys(ways, math.inf)
    for way in [way for _ in range(5) for way in shuffled(ways)]:
        seconds[way] = min(seconds[way], sample(Probe("", 0, "", way)))
    return min(seconds, key=seconds.__getitem__)


def _fastest_read(
    library: ctypes.CDLL, threads: int, spans: Callable[[], Sequence[tuple[int, int]]]
) -> Callable[[], object]:
    """A call reads `spans()`, addresses and floats."""

    def way(streams: int, ahead: int) -> None:
        for first, count in spans():
            library.limits_read(first, count, 1, streams, ahead, threads)

    return _fastest([partial(way, *each) for each in STREAMS])


def _fastest_copy(
    library: ctypes.CDLL, threads: int, spans: Callable[[], Sequence[tuple[int, int, int]]]
) -> Callable[[], object]:
    """A call copies `spans()`: addresses to and from, and floats."""

    def way(streaming: int, ahead: int) -> None:
        for to, first, count in spans():
            library.limits_copy(to, first, count, 1, streaming, ahead, threads)

    return _fastest([partial(way, *each) for each in STORES])


def _read(capability: str, threads: int) -> _Made:
    windows = _windows("source")
    return WINDOW, "B", _fastest_read(_library(capability), threads, lambda: [(next(windows), WINDOW // 4)])


def _copy(capability: str, threads: int) -> _Made:
    sources, destinations = _windows("source"), _windows("destination")
    spans = lambda: [(next(destinations), next(sources), WINDOW // 4)]  # noqa: E731
    return 2 * WINDOW, "B", _fastest_copy(_library(capability), threads, spans)


def _copy_to_fresh_pages(_capability: str, _threads: int) -> _Made:
    windows = cycle(_buffer("source").split(WINDOW // 4))
    return 2 * WINDOW, "B", lambda: next(windows).clone()


def _gemm(_capability: str, _threads: int) -> _Made:
    size = 1024
    left, right, out = torch.randn(3, size, size).unbind()
    return 2 * size**3, "FLOP", lambda: torch.mm(left, right, out=out)


def _tanh(_capability: str, threads: int) -> _Made:
    size, repeats = 65536 * threads, 16
    x, out = torch.linspace(-4, 4, size), torch.empty(size)

    def run() -> None:
        for _ in range(repeats):
            torch.tanh(x, out=out)

    return repeats * size, "elements", run


def _call(_capability: str, _threads: int) -> _Made:
    x, out, repeats = torch.zeros(1), torch.zeros(1), 100

    def run() -> None:
        for _ in range(repeats):
            torch.neg(x, out=out)

    return repeats, "calls", run


def _call_with_gradient(_capability: str, _threads: int) -> _Made:
    x, grad, repeats = torch.zeros(1, requires_grad=True), torch.ones(1), 20

    def run() -> None:
        for _ in range(repeats):
            torch.autograd.grad(torch.neg(x), x, grad)

    return repeats, "calls", run


_MAKERS = {
    "multiply-add": _multiply_add,  # float32, in registers
    "gemm": _gemm,  # torch.mm, float32
    "read": _read,  # memory
    "copy": _copy,  # memory, read + write, into pages that are there
    "copy to fresh pages": _copy_to_fresh_pages,  # torch.clone of what is too large for the allocator to keep
    "tanh": _tanh,  # torch.tanh, in cache
    "additive forward": _additive_loop("forward", 40_000_000),  # the prototype's inner loops, in cache
    "additive backward": _additive_loop("backward", 25_000_000),
    "call": _call,  # the cheapest of PyTorch's, from Python
    "call with gradient": _call_with_gradient,
}
NAMES = tuple(_MAKERS)
