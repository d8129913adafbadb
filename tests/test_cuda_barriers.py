"""Every barrier of the CUDA kernels is left out once (tests/cuda/shim.cpp): the shim has to miss it."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import attn_ext
from benchmarks import gpu_calls
from tests.cuda.compiler import compiler, host_library
from tests.processes import PACKAGE, python

ROOT = PACKAGE.parent

pytestmark = [pytest.mark.fused, pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")]


def barriers() -> list[str]:
    """ "file:line" of each."""
    return [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
        if path.name != "device.cuh"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r" +sync_(threads|warp)\(\);", line)
    ]


def without_weights(T: int, size: int) -> Callable[[], object]:
    """What a backward computes anew; rows of an odd size have a kernel of their own."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, T, size), (2, 70, size), (size,), (2, 70, 24))]
    return lambda: attn_ext.additive_attention(*leaves, need_weights=False)[0].sum().backward()


def calls() -> Iterator[Callable[[], object]]:
    """Through every kernel, at sizes that make it take all of its ways."""
    one_query = ((3, 1, 70, 33), (2, 1, 600, 64), (1, 1, 101, 512), (1, 1, 3, 1500))
    many_queries = ((2, 37, 65, 40), (1, 300, 9, 40), (1, 2, 1100, 8), (40, 2, 5, 3))
    for op in ("dot", "additive"):
        for sizes in one_query + many_queries:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                yield gpu_calls.of_an_op(op, sizes, dtype, "none", "cpu")
    yield from (without_weights(T, size) for T in (1, 5) for size in (40, 39))
    yield lambda: attn_ext.additive_attention(
        *(40 * torch.randn(size) for size in ((2, 5, 40), (2, 70, 40), (40,), (2, 70, 24)))
    )


def unnoticed() -> Iterator[str]:
    library = ctypes.CDLL(str(host_library()), mode=ctypes.RTLD_GLOBAL)
    attn_ext.use_backend("fused")
    every = list(calls())
    for call in every:
        call()
    for barrier in barriers():
        library.attn_ext_shim_skip(barrier.encode())
        for call in every:
            try:
                call()
            except RuntimeError as error:
                if re.search("no barrier since|nobody has written|is under way", str(error)):
                    break
                raise
        else:
            yield barrier


def test_every_barrier_is_missed() -> None:
    host_library()  # compiled here, where nobody waits for the process
    process = python("-m", "tests.test_cuda_barriers", cwd=ROOT, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stdout + process.stderr


if __name__ == "__main__":
    left = list(unnoticed())
    print(f"{len(barriers())} barriers, of which nobody misses {left}")
    sys.exit(1 if left else 0)
