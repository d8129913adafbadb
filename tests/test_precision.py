"""Accuracy at large magnitudes, where a shortcut for tanh or exp would fail first."""

from __future__ import annotations

import pytest
import torch

from tests.cases import DTYPES, LOSSES, Case, Problem, assert_accurate, short

pytestmark = pytest.mark.numerics

# Where factored exponentials end: |q| + |k| of about 43 in float32 (and halves), 350 in float64.
EDGES = {torch.float64: 350.0}


def additive(dtype: torch.dtype, T: int, **options: object) -> Problem:
    return Case("additive", T=T, S=40, D=33, Dm=8, dtype=dtype, **options).problem()


@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("magnitude", [0.25, 0.49, 0.4999, 0.5001, 0.51, 0.7, 1.0, 1.4, 2.5, 25], ids="edge*{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_opposite_query_and_keys(dtype: torch.dtype, magnitude: float, T: int) -> None:
    """Queries around +x against keys around -x: the sum is small and tanh is at its steepest, the factors are extreme."""
    problem = additive(dtype, T)
    shift = magnitude * EDGES.get(dtype, 43.0)
    query, keys = problem.tensors["query"], problem.tensors["keys"]
    assert_accurate(problem.with_tensors(query=query + shift, keys=keys - shift))
    assert_accurate(problem.with_tensors(query=query - shift, keys=keys + shift))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_uniform_1000(dtype: torch.dtype, T: int, loss: str) -> None:
    problem = additive(dtype, T, loss=loss)
    generator = torch.Generator().manual_seed(0)
    wide = {
        name: torch.empty_like(problem.tensors[name]).uniform_(-1000, 1000, generator=generator)
        for name in ("query", "keys")
    }
    assert_accurate(problem.with_tensors(**wide))


@pytest.mark.parametrize("outlier", [30.0, -60.0, 1e3, -1e4], ids="{:g}".format)
@pytest.mark.parametrize("where", ["query", "keys"])
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_one_outlier(dtype: torch.dtype, T: int, where: str, outlier: float) -> None:
    """One feature of one row of one batch element, met by its opposite in a row of the other side."""
    problem = additive(dtype, T, masking="lengths")
    problem.tensors["query"][0, -1, 17] = -outlier if where == "keys" else outlier
    problem.tensors["keys"][0, 34, 17] = -outlier if where == "query" else outlier
    assert_accurate(problem)


@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0], ids="{:g}".format)
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("method", ["dot", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_scores(dtype: torch.dtype, method: str, T: int, spread: float) -> None:
    """Scores far beyond exp's range: the running maximum must hold, and a row may be one weight of 1."""
    problem = Case(method, T=T, S=70, D=33, Dm=8, dtype=dtype, scale=20 * spread).problem()
    results, truth = problem.results(), problem.to(torch.float64).reference_results()
    for name in ("context", "weights"):
        assert results[name].isfinite().all()
    torch.testing.assert_close(results["weights"].sum(-1), torch.ones_like(results["weights"][..., 0]), atol=2e-2, rtol=0)
    # Where scores are large, their rounding is the error: torch's own, not twice nothing.
    own = problem.reference_results()
    for name in ("context", "weights"):
        error, own_error = ((r[name].double() - truth[name]).abs().max() for r in (results, own))
        assert error <= 2 * own_error + 20 * spread * 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
