"""How the CUDA kernels of one query divide its steps (csrc/cuda/splits.cpp), which is decided on the host."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.compilers import compile_program

FLOAT, DOUBLE, BFLOAT16, HALF = range(4)
MOST_ADDITIVE_STEPS = 1024


class Call(NamedTuple):
    additive: bool
    backward: bool
    dtype: int
    B: int
    S: int
    A: int
    Dm: int
    processors: int = 132
    blocks: int = 4


class Splits(NamedTuple):
    count: int
    steps: int
    width: int


@pytest.fixture(scope="module")
def program() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    sources = ("tests/cuda/divide.cpp", "csrc/cuda/splits.cpp")
    return compile_program("divide", compiler, sources, ("-std=c++20", "-O1", "-Icsrc/cuda"), ())


def divide(program: Path, calls: list[Call]) -> list[Splits]:
    lines = "".join(" ".join(str(int(number)) for number in call) + "\n" for call in calls)
    process = subprocess.run([program], input=lines, capture_output=True, text=True, timeout=60, check=True)
    return [Splits(*map(int, line.split())) for line in process.stdout.splitlines()]


def some_calls() -> list[Call]:
    draw = random.Random(0)

    def size(most: int) -> int:
        return int(most ** draw.random())

    return [
        Call(
            bool(draw.getrandbits(1)),
            bool(draw.getrandbits(1)),
            draw.randrange(4),
            size(20_000),
            size(100_000),
            width := size(1024),
            width,
            draw.choice([1, 4, 40, 108, 132]),
            draw.choice([1, 2, 3, 4]),
        )
        for _ in range(3000)
    ]


def test_every_step_is_in_one_split_and_no_split_is_empty(program: Path) -> None:
    calls = some_calls()
    for call, (count, steps, width) in zip(calls, divide(program, calls), strict=True):
        assert (count - 1) * steps < call.S <= count * steps, call
        assert steps < 8 or steps % 8 == 0 or count == 1 or steps == MOST_ADDITIVE_STEPS, call
        assert width in ((1,) if call.additive else (1, 2, 4)), call
        assert width <= call.blocks, call
        if call.additive:
            assert steps <= MOST_ADDITIVE_STEPS, call


def test_no_block_waits_for_another_that_need_not(program: Path) -> None:
    calls = [call for call in some_calls() if not call.additive or call.S <= MOST_ADDITIVE_STEPS]
    for call, (count, _, width) in zip(calls, divide(program, calls), strict=True):
        at_once = call.processors * (call.blocks // width)
        assert call.B * count <= at_once or count == 1, call
        if width > 1:
            assert call.processors >= call.B, call


@pytest.mark.parametrize("additive", [False, True], ids=["dot", "additive"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_work_is_spread_where_it_is_worth_it(program: Path, backward: bool, additive: bool) -> None:
    def divided(B: int, S: int, D: int, dtype: int = FLOAT) -> Splits:
        return divide(program, [Call(additive, backward, dtype, B, S, D, D)])[0]

    assert divided(1, 10_000, 512).count >= 66  # half the multiprocessors
    assert divided(16, 400, 512, BFLOAT16).count >= 8
    assert divided(2, 3, 8).count == 1
    assert divided(2000, 50, 512).count == 1
    # of rows that do not lie on 16 bytes a block takes longer
    assert divided(96, 300, 300, BFLOAT16).count >= divided(96, 300, 304, BFLOAT16).count
