"""Additive attention where its kernels change their ways: the ranges of exponentials and of v, and many queries."""

from __future__ import annotations

import pytest
import torch

from tests.cases import DTYPES, Case, assert_accurate, assert_same, short


@pytest.mark.numerics
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("size", [10, 10.5, 10.7, 15.9, 16.1, 21.4, 22, 25, 44], ids="{:g}".format)
def test_at_the_edge_of_factored_exponentials(size: float, T: int) -> None:
    """Keys like their queries and opposite to them are neighbours: 1 + exp(4 size) and 2 share a reciprocal."""
    problem = Case("additive", T=T, S=70, D=37, Dm=8).problem()
    query, keys = (1e-3 * problem.tensors[name].tanh() for name in ("query", "keys"))
    checkered = (torch.arange(70).unsqueeze(1) + torch.arange(37)) % 2 * 2 - 1
    assert_accurate(problem.with_tensors(query=query + size, keys=keys + size * checkered))


@pytest.mark.numerics
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
def test_large_v(T: int) -> None:
    """Two features that share a reciprocal take on each other's denominators, 1 + exp(36) here."""
    problem = Case("additive", T=T, S=40, D=37, Dm=8, scale=1e-30).problem()
    query, keys, v = (problem.tensors[name] for name in ("query", "keys", "v"))
    assert_accurate(problem.with_tensors(query=query / 2 + 9, keys=keys / 2 + 9, v=1e30 * v))


@pytest.mark.numerics
@pytest.mark.parametrize("T", [1, 3, 17, 70], ids="T={}".format)
@pytest.mark.parametrize("spread", [1, 4], ids="{:g}".format)
@pytest.mark.parametrize("largest", [0.03, 0.7], ids="v<{:g}".format)
def test_v_of_one_sign(largest: float, spread: float, T: int) -> None:
    """As tutorials draw it. What all steps' scores have in common is many times what they differ by."""
    problem = Case("additive", T=T, S=40, D=1024, Dm=8).problem()
    query, keys = (spread * problem.tensors[name] for name in ("query", "keys"))
    if T == 1:
        largest = min(largest, 0.4)  # fewer sums side by side are longer, and a GPU's begin with 0
    v = largest * torch.rand(1024, generator=torch.Generator().manual_seed(0))
    assert_accurate(problem.with_tensors(query=query, keys=keys, v=v))


@pytest.mark.parametrize("S", [17, 130], ids="S={}".format)
@pytest.mark.parametrize("T", [64, 128, 129, 300], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_many_queries(dtype: torch.dtype, T: int, S: int) -> None:
    """Keys and v gather gradients from several tiles of queries."""
    problem = Case("additive", T=T, S=S, D=33, Dm=8, dtype=dtype, masking="lengths").problem()
    assert_accurate(problem)
    assert_same(problem.results(), problem.results())


@pytest.mark.parametrize(
    ("dtype", "B", "T", "D"), [(torch.bfloat16, 64, 1032, 5), (torch.float64, 22, 530, 65)], ids=["bfloat16", "float64"]
)
def test_more_queries_than_tiles_of_one_launch(dtype: torch.dtype, B: int, T: int, D: int) -> None:
    """Of eight tiles of 128 queries, 32 of double, the keys' gradient waits in the workspace at a time."""
    assert_accurate(Case("additive", B=B, T=T, S=3, D=D, Dm=2, dtype=dtype, masking="lengths").problem())


@pytest.mark.parametrize("T", [1, 3, 40], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_no_features_of_rows_that_have_some(dtype: torch.dtype, T: int) -> None:
    """Rows that could be read 16 bytes at a time, if there were any."""
    problem = Case("additive", T=T, S=20, D=8, Dm=8, dtype=dtype).problem()
    none = {name: problem.tensors[name][..., :0] for name in ("query", "keys", "v")}
    assert_accurate(problem.with_tensors(**none))


# Rows that one query's kernels hold in registers, and longer ones (of double, from 512 on; of others, 1024), and what
# vectors can read and what they cannot.
WIDE = [(1024, 1024), (512, 512), (256, 256), (128, 128), (64, 128), (16, 8), (8, 16), (8, 1024), (1024, 8), (520, 264)]
WIDE += [(1032, 64), (64, 1032), (1027, 33), (33, 515), (513, 1025)]


@pytest.mark.parametrize("sizes", WIDE, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("masking", ["none", "lengths+rows"])
@pytest.mark.parametrize("loss", ["both", "context"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_query_of_wide_and_unequal_rows(
    dtype: torch.dtype, loss: str, masking: str, sizes: tuple[int, int]
) -> None:
    """One step, and so many that there are several splits."""
    A, Dm = sizes
    for S in (1, 130):
        problem = Case("additive", B=3, T=1, S=S, D=A, Dm=Dm, dtype=dtype, masking=masking, loss=loss).problem()
        assert_accurate(problem)
        assert_same(problem.results(), problem.results())
