"""CUDA kernels on the CPU (tests/cuda/shim.h): each kind of bug is found, and none where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.compilers import compile_program

SHIM, KERNELS = "tests/cuda/shim.cpp", "tests/cuda/planted.cpp"

# What is planted in each kernel of tests/cuda/planted.cpp, as the shim says it.
PLANTED = {
    "aligned_elements": "not aligned",
    "aligned_vectors": "not aligned",
    "barrier_after_copies": ("which nobody has written", "has written with no barrier since"),
    "barrier_before_copies": ("with no barrier since", "where the copy of thread"),
    "barrier_before_read": ("which nobody has written", "has written with no barrier since"),
    "barrier_before_write": ("has read with no barrier since", "has written with no barrier since"),
    "blocks_write_apart": "of another block has written",
    "copies_in_flight": "is under way",
    "copy_is_committed": "is under way",
    "copy_is_waited_for": "is under way",
    "every_thread_at_the_barrier": "thread 0 waits in sync_threads at planted.cpp",
    "inside_an_allocation": "outside of what was allocated",
    "inside_shared_memory": "byte 256 of shared memory, which has 256",
    "last_launch_is_waited_for": "has not waited for the last launch",
    "no_copy_outlives_the_kernel": "has left with copies under way",
    "no_more_shared_memory_than_there_is": "invalid argument",
    "no_more_threads_than_there_are": "invalid configuration argument",
    "no_null_pointer": "at a null pointer",
    "nobody_leaves_before_the_barrier": "thread 50 has left the kernel",
    "not_before_shared_memory": "of shared memory, which has 256",
    "one_barrier_for_all": "thread 5 waits in any_in_block",
    "one_shuffle_for_all": "threads meet in different places",
    "one_writer": "has written with no barrier since",
    "shuffle_among_lanes": "asks for lane 32",
    "shuffle_orders_nothing": ("which nobody has written", "has written with no barrier since"),
    "streaming_is_for_global_memory": "for global memory",
    "threads_write_apart": "has written with no barrier since",
    "warp_barrier": ("which nobody has written", "has written with no barrier since"),
    "warp_barrier_is_not_the_blocks": ("which nobody has written", "has written with no barrier since"),
    "whole_warp_shuffles": "waits in shuffle_xor",
    "whole_warps": "the last warp has 16 threads",
    "written_before_read": "which nobody has written",
    "written_by_this_block": "which nobody has written",
}


@pytest.fixture(scope="module")
def planted() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    return compile_program(
        "planted",
        compiler,
        (SHIM, KERNELS),
        ("-std=c++20", "-O2", "-g1", "-w", "-fno-strict-aliasing", "-Itests/cuda", "-Icsrc/cuda"),
        ("-rdynamic", "-fsanitize=address", "-ldl"),
        own_flags={KERNELS: ("-fsanitize=thread",)},
    )


def output(program: Path, *arguments: str) -> bytes:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    process = subprocess.run([program, *arguments], capture_output=True, env=environment, timeout=100)
    assert process.returncode == 0, process.stderr[-4000:].decode()
    return process.stdout


def test_every_kernel_has_its_bug_here(planted: Path) -> None:
    assert set(output(planted, "list").decode().split()) == set(PLANTED)


@pytest.mark.parametrize("kernel", PLANTED)
def test_a_planted_bug_is_found_and_named(planted: Path, kernel: str) -> None:
    words = PLANTED[kernel]
    for said in output(planted, kernel, "wrong").decode().splitlines():
        assert any(word in said for word in ([words] if isinstance(words, str) else words))
        assert f"attn_ext::cuda::{kernel}(" in said
    assert output(planted, kernel, "right").decode().splitlines() == ["right"] * 5


@pytest.mark.parametrize("ptx", [75, 80, 90, 120])
def test_no_launch_begins_early_that_would_not_wait(planted: Path, ptx: int) -> None:
    """Hopper's code that a driver made of older PTX has no wait in it: its merges had read what was still written."""
    assert output(planted, "behind", str(ptx)).decode().splitlines() == ["right"] * 5


@pytest.mark.parametrize(("kilobytes", "blocks"), [(32, 1), (64, 1), (100, 3), (164, 4), (228, 6)])
def test_blocks_have_shared_memory_and_the_systems_share(planted: Path, kilobytes: int, blocks: int) -> None:
    """A plan by registers alone had four at a time, where 7.5 has room for one, and 8.6, 8.9 and 12.0 for three."""
    assert int(output(planted, "room", str(kilobytes))) == blocks


def test_a_seed_is_an_order_of_blocks_and_threads(planted: Path) -> None:
    orders = [[int(number) for number in output(planted, "order", seed).split()] for seed in ("1", "1", "2")]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == list(range(192))
        assert order[:64] != sorted(order[:64])
    assert orders[0] != list(range(192))


def test_halves_are_pytorchs(planted: Path) -> None:
    written = output(planted, "conversions")
    patterns = torch.arange(1 << 16).to(torch.uint16)
    for index, dtype in enumerate((torch.float16, torch.bfloat16)):
        mine = torch.frombuffer(bytearray(written[index << 18 : (index + 1) << 18]), dtype=torch.float32)
        torch.testing.assert_close(mine, patterns.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    rounded = torch.frombuffer(bytearray(written[2 << 18 :]), dtype=torch.uint8).view(-1, 8)
    floats = rounded[:, :4].clone().view(torch.float32).flatten()
    assert floats.isfinite().sum() > 1_000_000
    for first, dtype in ((4, torch.float16), (6, torch.bfloat16)):
        mine = rounded[:, first : first + 2].clone().view(dtype).flatten()
        torch.testing.assert_close(mine, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_threads_get_what_the_others_have(planted: Path) -> None:
    rows = torch.tensor([int(number) for number in output(planted, "exchange").split()]).view(64, 7)
    for i, row in enumerate(rows.tolist()):
        first = i // 32 * 32
        assert row == [i ^ 5, first + 7, 496 + 32 * first, -first, 24, 1, 0]


def test_approximations_are_as_good_as_a_gpus(planted: Path) -> None:
    """A unit in the last place off here and there, and no subnormals."""
    written = torch.frombuffer(bytearray(output(planted, "approximations")), dtype=torch.float32).view(-1, 3)
    x = written[:, 0].double()
    tiny = torch.finfo(torch.float32).tiny
    flushed = torch.where(x.abs() < tiny, torch.copysign(torch.zeros(()), x), x)
    for mine, exact in ((written[:, 1], flushed.exp2()), (written[:, 2], 1 / flushed)):
        assert torch.equal(mine.isnan(), exact.isnan())
        large = exact.abs() > torch.finfo(torch.float32).max
        assert torch.equal(mine.isinf(), large)
        assert not ((mine != 0) & (mine.abs() < tiny)).any()
        normal = (exact.abs() >= 2 * tiny) & ~large
        error = ((mine.double() - exact) / exact)[normal].abs()
        assert 2**-24 < error.max() < 1.5 * 2**-23
        assert (error > 2**-24).float().mean() > 0.2
        assert (mine[exact.abs() < tiny / 2] == 0).all()
        assert torch.equal(mine.signbit()[~mine.isnan()], exact.signbit()[~exact.isnan()])
