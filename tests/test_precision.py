"""Accuracy at large magnitudes, where shortcuts for tanh or exp would fail first, and at PyTorch's lower precisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attn_ext
from tests.cases import DTYPES, FACTORS, LOSSES, Case, Problem, assert_accurate, short

pytestmark = pytest.mark.numerics

# Where factored exponentials end: |q| + |k| of about 43 in float32 (and halves), 350 in float64.
EDGES = {torch.float64: 350.0}


def additive(dtype: torch.dtype, T: int, **options: object) -> Problem:
    return Case("additive", T=T, S=40, D=33, Dm=8, dtype=dtype, **options).problem()


@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize(
    "edge", [0.15, 0.25, 0.37, 0.49, 0.4999, 0.5001, 0.51, 0.7, 1, 1.4, 2.5, 25], ids="edge*{}".format
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_opposite_query_and_keys(dtype: torch.dtype, edge: float, T: int) -> None:
    """Queries around +x, keys around -x: tanh of their sum is at its steepest, their exponentials are extreme."""
    problem = additive(dtype, T)
    shift = edge * EDGES.get(dtype, 43.0)
    query, keys = problem.tensors["query"], problem.tensors["keys"]
    assert_accurate(problem.with_tensors(query=query + shift, keys=keys - shift))
    assert_accurate(problem.with_tensors(query=query - shift, keys=keys + shift))


@pytest.mark.parametrize("shift", [50.0, -50.0], ids="{:+g}".format)
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_saturated(dtype: torch.dtype, T: int, shift: float) -> None:
    """Where every tanh is 1 or -1 to the last bit, query and keys get nothing, however much comes in."""
    problem = additive(dtype, T)
    results = problem.with_tensors(keys=problem.tensors["keys"] + shift).results()
    assert (results["grad query"] == 0).all()
    assert (results["grad keys"] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_uniform_1000(dtype: torch.dtype, T: int, loss: str) -> None:
    problem = additive(dtype, T, loss=loss)
    generator = torch.Generator().manual_seed(0)
    wide = {
        name: 2000 * torch.rand(problem.tensors[name].shape, generator=generator, dtype=dtype) - 1000
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


SHAPES_OF_V = {
    "zero": lambda v: v * 0,
    "one of it": lambda v: torch.where(torch.arange(len(v)) == 5, v, 0),
    "one large": lambda v: torch.where(torch.arange(len(v)) == 5, v, 1e-4 * v),
    "one tiny": lambda v: torch.where(torch.arange(len(v)) == 5, 1e-7 * v, v),
    "of all sizes": lambda v: v * torch.logspace(-7, 0, len(v), dtype=v.dtype),
    "large": lambda v: v * 3e4,
    "small": lambda v: v * 1e-4,
    "with a NaN": lambda v: torch.where(torch.arange(len(v)) == 5, torch.nan, v),
}


@pytest.mark.parametrize("spread", [1.0, 6.0, 14.0], ids="spread={:g}".format)
@pytest.mark.parametrize("shape", SHAPES_OF_V)
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_additive_any_v(dtype: torch.dtype, T: int, shape: str, spread: float) -> None:
    """Kernels that divide by v must not notice how large its elements are, nor how far apart."""
    problem = additive(dtype, T)
    query, keys, v = (problem.tensors[name] for name in ("query", "keys", "v"))
    problem = problem.with_tensors(query=query * spread, keys=keys * spread, v=SHAPES_OF_V[shape](v))
    if shape == "with a NaN":
        assert problem.results()["context"].isnan().all()
    else:
        assert_accurate(problem)


@pytest.mark.parametrize("scale", [20.0, 200.0, 2000.0], ids="scale={:g}".format)
@pytest.mark.parametrize("T", [1, 3, 70], ids="T={}".format)
@pytest.mark.parametrize("method", ["dot", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_scores(dtype: torch.dtype, method: str, T: int, scale: float) -> None:
    """Scores far beyond exp's range are still a softmax, as near the truth as their own rounding lets anyone come."""
    problem = Case(method, T=T, S=70, D=33, Dm=8, dtype=dtype, scale=scale, loss="context").problem()
    results, own, truth = problem.results(), problem.reference_results(), problem.to(torch.float64).reference_results()
    rounding_of_scores = 8 * scale * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name in ("context", "weights"):
        error, own_error = ((r[name].double() - truth[name]).abs().max() for r in (results, own))
        assert error <= 2 * own_error + rounding_of_scores, name
    sums = results["weights"].double().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=4 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("scale", [300.0, 1000.0], ids="scale={:g}".format)
@pytest.mark.parametrize(
    ("T", "S", "loss"),
    [
        (1, 300, "context"),
        (1, 300, "no_weights"),
        (3, 300, "context"),
        (17, 300, "context"),
        (64, 257, "context"),
        (130, 600, "context"),
    ],
)
@pytest.mark.parametrize("method", ["dot", "keyed_dot", "additive"])
def test_all_the_weight_on_one_step(method: str, T: int, S: int, loss: str, scale: float) -> None:
    """Its score has no gradient, and the scale is not to multiply one that rounding made."""
    problem = Case(method, T=T, S=S, D=33, Dm=20, loss=loss, scale=scale).problem()
    results, own, truth = problem.results(), problem.reference_results(), problem.to(torch.float64).reference_results()
    exact = problem.to(torch.float64)
    weights = replace(exact, options=exact.options | {"need_weights": True}).reference_results()["weights"]
    all_on_one = weights.amax(-1) > 1 - 1e-12
    assert all_on_one.any()
    error, own_error = (
        (r["grad query"].double() - truth["grad query"])[all_on_one].abs().max() for r in (results, own)
    )
    assert error <= 2 * own_error + 1e-8


@pytest.mark.parametrize("scale", [1e4, 1e7, 1e9], ids="scale={:g}".format)
@pytest.mark.parametrize("S", [200, 300, 3000], ids="S={}".format)
@pytest.mark.parametrize("T", [1, 3, 300], ids="T={}".format)
@pytest.mark.parametrize("method", ["keyed_dot", "additive"])
def test_recomputed_weights_are_at_most_1(method: str, T: int, S: int, scale: float) -> None:
    """Of scores that are rounded otherwise than in the forward, by much more than exp's range."""
    problem = Case(method, B=1, T=T, S=S, D=48, Dm=8, loss="no_weights", scale=scale).problem()
    query = problem.tensors["query"].clone()
    query[0, -1, 0] = 60.0  # out of the range of factored exponentials
    results = problem.with_tensors(query=query).results()
    assert all(result.isfinite().all() for result in results.values())
    at_most = problem.grad_outputs["context"].abs().sum(1, keepdim=True) * (1 + 1e-5)
    assert (results["grad values"].abs() <= at_most).all()


@pytest.mark.parametrize("need_weights", [True, False], ids="weights={}".format)
@pytest.mark.parametrize("S", [24, 300], ids="S={}".format)
@pytest.mark.parametrize("T", [1, 5, 24], ids="T={}".format)
def test_dot_rows_with_much_in_common(T: int, S: int, need_weights: bool) -> None:
    """What all rows share multiplies the sum of the scores' gradients, which is 0 but for how it is rounded.

    The numbers are small integers, so that the scores are exact and that sum alone is to be seen.
    """
    generator = torch.Generator().manual_seed(0)
    B, D = 8, 512
    query = torch.randint(-2, 3, (B, 1, D), generator=generator).float().expand(B, T, D)
    dropped = torch.rand(B, S, D, generator=generator) < 4 / D
    memory = torch.where(dropped, torch.zeros(()), query[:, :1].sign())
    grad_context = torch.randn(B, T, D, generator=generator)

    def grad_query(dtype: torch.dtype, backend: str) -> torch.Tensor:
        inputs = query.to(dtype).requires_grad_(), memory.to(dtype).requires_grad_()
        with attn_ext.use_backend(backend):
            context, _ = attn_ext.dot_attention(*inputs, need_weights=need_weights)
        return torch.autograd.grad((context * grad_context.to(context)).sum(), inputs[0])[0].double()

    truth = grad_query(torch.float64, "reference")
    error, own_error = (
        (grad_query(torch.float32, b) - truth).abs().max() / truth.abs().max() for b in ("auto", "reference")
    )
    # Weights that are recomputed are as far off as their log-sum-exp, the size of the scores, is rounded.
    rounding = 0 if need_weights else torch.finfo(torch.float32).eps * (query * memory[:, :1]).sum(-1).max()
    assert error <= 2 * own_error + rounding


@pytest.mark.numerics
@pytest.mark.parametrize("loss", ["context", "no_weights"])
@pytest.mark.parametrize("T", [1, 4, 8, 16, 130], ids="T={}".format)
@pytest.mark.parametrize(
    ("method", "S"),
    [("dot", 40), ("dot", 300), ("dot", 1100), ("keyed_dot", 40), ("keyed_dot", 300), ("keyed_dot", 1100)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_rows_of_halves_with_much_in_common(dtype: torch.dtype, method: str, T: int, S: int, loss: str) -> None:
    """Products of halves round the gradients of the scores: what that adds to their sum is taken off the query's."""
    problem = Case(method, T=T, S=S, D=64, Dm=64, dtype=dtype, loss=loss).problem()
    common = 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    alike = {
        name: (0.3 * tensor.float() + common).to(dtype) for name, tensor in problem.tensors.items() if name != "query"
    }
    assert_accurate(problem.with_tensors(**alike))


@pytest.mark.numerics
@pytest.mark.parametrize("common", [0.0, 3.0], ids="common={:g}".format)
@pytest.mark.parametrize("spread", [1.0, 0.05], ids="spread={:g}".format)
@pytest.mark.parametrize("S", [120, 300, 600], ids="S={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_additive_halves_of_slopes_alike(dtype: torch.dtype, S: int, spread: float, common: float) -> None:
    """Near 0 all slopes of tanh are 1, and what the scores' gradients do not sum up to is all of the query's."""
    problem = Case("additive", T=16, S=S, D=32, Dm=32, dtype=dtype, loss="no_weights").problem()
    query, keys, values, _ = problem.tensors.values()
    common_part = common * torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert_accurate(
        problem.with_tensors(query=spread * query, keys=spread * keys, values=(values.float() + common_part).to(dtype))
    )


@pytest.mark.numerics
@pytest.mark.parametrize("method", ["dot", "keyed_dot"])
@pytest.mark.parametrize("S", [40, 300], ids="S={}".format)
@pytest.mark.parametrize("T", [2, 16, 40], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_row_hidden_from_a_query_is_nothing_to_it(dtype: torch.dtype, T: int, S: int, method: str) -> None:
    """Bit by bit, though it is large and others attend it."""
    problem = Case(method, T=T, S=S, D=32, Dm=32, dtype=dtype, loss="no_weights").problem()
    mask = torch.ones(2, T, S, dtype=torch.bool)
    mask[:, 1:, 5] = False
    problem = replace(problem, options=problem.options | {"mask": mask})

    def gradient(factor: float) -> Tensor:
        rows = {name: tensor.clone() for name, tensor in problem.tensors.items() if name != "query"}
        for tensor in rows.values():
            tensor[:, 5] *= factor
        return problem.with_tensors(**rows).results()["grad query"][:, 1:]

    assert torch.equal(gradient(1.0), gradient(1000.0))


@pytest.mark.cpu
@pytest.mark.parametrize("masking", ["none", "lengths+pairs"])
@pytest.mark.parametrize("size", [(5, 33), (12, 40), (40, 64), (130, 250)], ids=str)
@pytest.mark.parametrize("method", ["dot", "keyed_dot", "general", "additive", "concat"])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_as_exact_as_pytorch_asks(
    precision: str, method: str, size: tuple[int, int], masking: str, each_backend: str
) -> None:
    torch.set_float32_matmul_precision(precision)
    T, D = size
    problem = Case(method, T=T, S=D + 20, D=D, Dm=D, masking=masking).problem()
    truth = problem.to(torch.float64).reference_results()
    for name, result in problem.results().items():
        error, largest = (result.double() - truth[name]).abs().max(), truth[name].abs().max()
        assert error <= 4 * torch.finfo(FACTORS[precision]).eps * max(largest, 1), name


@pytest.mark.parametrize("T", [1, 50], ids="T={}".format)
def test_gradient_of_v_where_tanh_is_small(T: int) -> None:
    """As after an initialisation: v's gradient is a sum of small terms, relative to which its error is to be small."""
    generator = torch.Generator().manual_seed(0)
    sizes_and_spreads = [((4, T, 64), 0.02), ((4, 400, 64), 0.02), ((64,), 0.125), ((4, 400, 32), 1.0)]
    tensors = [torch.randn(size, generator=generator) * spread for size, spread in sizes_and_spreads]
    grad_context = torch.randn(4, T, 32, generator=generator)

    def grad_v(*tensors: torch.Tensor) -> torch.Tensor:
        query, keys, v, values = tensors
        context, _ = attn_ext.additive_attention(query, keys, v.requires_grad_(), values)
        return torch.autograd.grad((context * grad_context.to(context.dtype)).sum(), v)[0]

    with attn_ext.use_backend("reference"):
        truth = grad_v(*(tensor.double() for tensor in tensors))
    error = (grad_v(*tensors).double() - truth).abs().max() / truth.abs().max()
    assert error < 1e-5
