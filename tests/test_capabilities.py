"""The numbers again under the instruction sets that this machine has and would not choose (ATEN_CPU_CAPABILITY)."""

from __future__ import annotations

import os

import pytest
import torch

from tests.cases import Case
from tests.processes import PACKAGE, python

# A machine that has one has those before it. The last two, what it has beyond avx512, cannot be asked for by name.
PRINT_CAPABILITY = """
import torch
from attn_ext import backend

assert backend.unavailable() is None
print(torch.ops.attn_ext.cpu_capability())
"""
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16", "avx512_amx")


@pytest.mark.fused
@pytest.mark.parametrize("capability", CAPABILITIES[:-2])
def test_numerics_under(capability: str) -> None:
    own = torch.ops.attn_ext.cpu_capability()
    if CAPABILITIES.index(own) <= CAPABILITIES.index(capability):
        pytest.skip(f"this run is at {own} already")
    process = python(
        *("-m", "pytest", "-m", "numerics", "-q", "--tb=line", "-p", "no:cacheprovider", "tests"),
        cwd=PACKAGE.parent,
        ATEN_CPU_CAPABILITY=capability,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]
    assert "passed" in process.stdout
    assert "skipped" not in process.stdout


@pytest.mark.fused
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this run has asked for one by its name")
@pytest.mark.parametrize("name", ["", "AVX512", "fast"])
def test_a_name_that_nobody_knows_changes_nothing(name: str) -> None:
    """PyTorch ignores it."""
    process = python("-c", PRINT_CAPABILITY, cwd=PACKAGE.parent, ATEN_CPU_CAPABILITY=name)
    assert process.stdout.split() == [torch.ops.attn_ext.cpu_capability()], process.stderr


@pytest.mark.numerics
@pytest.mark.fused
@pytest.mark.cpu
@pytest.mark.parametrize(
    ("method", "T", "precision", "rounders"),
    [
        ("dot", 1, "medium", ()),  # bound by what it reads
        ("dot", 256, "medium", ("avx512_bf16", "avx512_amx")),
        ("dot", 256, "high", ("avx512_amx",)),
        ("additive", 256, "medium", ("avx512_bf16", "avx512_amx")),
    ],
)
def test_products_are_no_more_exact_where_that_takes_longer(
    method: str, T: int, precision: str, rounders: tuple[str, ...]
) -> None:
    problem = Case(method, B=1, T=T, S=256, D=256, Dm=256).problem()
    exact = problem.results()
    torch.set_float32_matmul_precision(precision)
    rounds = any(not torch.equal(result, exact[name]) for name, result in problem.results().items())
    assert rounds == (torch.ops.attn_ext.cpu_capability() in rounders)
