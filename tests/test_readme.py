"""The programs in README.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program(program: str, each_backend: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["weights"].shape[-1] == names["encoder_outputs"].shape[1]


def test_the_loop_learns() -> None:
    """Its batch many times over: the loss falls to a fraction."""
    program = next(program for program in PROGRAMS if "optimizer.step()" in program)
    setup, loop = program.split("\nfor source")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(setup, names)
    losses = []
    for _ in range(80):
        exec(f"for source{loop}", names)
        losses.append(names["loss"].item())
    assert losses[-1] < losses[0] / 2
