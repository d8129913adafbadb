"""Dot attention where its kernels change their ways: the columns that a lane holds, splits of the source, long rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import attn_ext
from tests.cases import DTYPES, LOSSES, Case, assert_accurate, assert_same, short


@pytest.mark.parametrize(
    "D", [1, 2, 4, 5, 8, 16, 31, 64, 72, 128, 136, 256, 264, 512, 520, 1024, 1032], ids="D={}".format
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_step_of_any_width(dtype: torch.dtype, D: int) -> None:
    assert_accurate(Case("dot", B=3, T=1, S=37, D=D, dtype=dtype, masking="lengths+rows").problem())


# Of 4 multiprocessors, which the kernels are told of on the host, and of a large GPU's.
ALONE = [(4, S, D) for S in (100, 101, 102) for D in (256, 512, 1024)] + [(64, 50, 512)]


@pytest.mark.parametrize("masking", ["none", "lengths+rows"])
@pytest.mark.parametrize(("B", "S", "D"), ALONE, ids="{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_step_that_has_a_multiprocessor_for_itself(
    dtype: torch.dtype, B: int, S: int, D: int, masking: str
) -> None:
    """On a GPU its block is several times as wide, as far as there is shared memory."""
    problem = Case("dot", B=B, T=1, S=S, D=D, dtype=dtype, masking=masking).problem()
    assert_accurate(problem)
    assert_same(problem.results(), problem.results())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("S", "D"), [(1, 24), (33, 24), (64, 24), (65, 24), (300, 24), (2100, 24), (300, 512), (301, 250)], ids="{}".format
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_step_in_splits(dtype: torch.dtype, S: int, D: int, loss: str) -> None:
    """To the same bits, whichever comes last."""
    problem = Case("dot", T=1, S=S, D=D, dtype=dtype, masking="lengths", loss=loss).problem()
    assert_accurate(problem)
    assert_same(problem.results(), problem.results())


# 18 MB in halves, of which nothing stays in a cache: rows that are streamed as they are and, of an odd size, are not.
LARGE = [(9, 1003, 1024), (24, 1499, 256), (9, 1003, 1001)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("B", "S", "D"), LARGE, ids="{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_step_of_a_large_memory(dtype: torch.dtype, B: int, S: int, D: int, loss: str) -> None:
    """On a CPU what is left to do with some rows is done beside the reading of the next."""
    problem = Case("dot", B=B, T=1, S=S, D=D, dtype=dtype, masking="lengths+rows", loss=loss).problem()
    assert_accurate(problem)


@pytest.mark.parametrize(("B", "S", "D"), LARGE, ids="{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_step_of_a_large_memory_without_its_gradient(dtype: torch.dtype, B: int, S: int, D: int) -> None:
    problem = Case("dot", B=B, T=1, S=S, D=D, dtype=dtype, masking="lengths+rows").problem()
    query = problem.tensors["query"].requires_grad_()
    outputs = attn_ext.dot_attention(query, problem.tensors["memory"], **problem.options)
    (grad_query,) = torch.autograd.grad(outputs, query, list(problem.grad_outputs.values()))
    torch.testing.assert_close(grad_query, problem.results()["grad query"])


@pytest.mark.parametrize("D", [24, 1032], ids="D={}".format)
def test_one_step_without_its_dimension(D: int) -> None:
    problem = Case("dot", T=1, S=37, D=D, masking="lengths").problem()
    without = replace(
        problem,
        tensors=problem.tensors | {"query": problem.tensors["query"][:, 0]},
        grad_outputs={name: grad[:, 0] for name, grad in problem.grad_outputs.items()},
    )
    expected = problem.results()
    for name, result in without.results().items():
        assert torch.equal(result, expected[name] if name == "grad memory" else expected[name][:, 0]), name


@pytest.mark.parametrize("loss", ["both", "no_weights"])
@pytest.mark.parametrize("S", [128, 129, 512, 513, 1024, 1025, 2050], ids="S={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rows_of_scores(dtype: torch.dtype, S: int, loss: str) -> None:
    assert_accurate(Case("dot", T=3, S=S, D=8, dtype=dtype, masking="lengths+pairs", loss=loss).problem())


@pytest.mark.parametrize("T", [1, 3, 20], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_single_step(dtype: torch.dtype, T: int) -> None:
    """It has all the weight, whatever its score, if that is a number and finite."""
    problem = Case("dot", T=T, S=1, D=8, dtype=dtype).problem()
    assert_accurate(problem)
    for score in (math.nan, math.inf):
        problem.tensors["query"][0, -1] = score
        problem.tensors["memory"][0] = 1
        weights = problem.results()["weights"]
        assert weights[0, -1].isnan().all()
        assert (weights[1:] == 1).all()
        assert (weights[0, :-1] == 1).all()


@pytest.mark.numerics
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("T", [1, 3, 33], ids="T={}".format)
@pytest.mark.parametrize(("method", "of_steps"), [("dot", "memory"), ("additive", "keys")])
def test_no_exponential_of_a_nan_is_a_number(method: str, of_steps: str, T: int, bits: int) -> None:
    """Whatever its bits are: exponents are set by arithmetic of whole numbers."""
    problem = Case(method, B=1, T=T, S=40, D=24).problem()
    for name, rows in (("query", slice(0, 1)), (of_steps, slice(None))):
        tensor = problem.tensors[name].clone()
        tensor[0, 0, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        context = problem.with_tensors(**{name: tensor}).results()["context"]
        assert context[0, rows].isnan().all(), name


@pytest.mark.parametrize("S", [7, 70, 300, 1100], ids="S={}".format)
@pytest.mark.parametrize("T", [2, 17, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_score_that_is_no_number(dtype: torch.dtype, T: int, S: int, each_backend: str) -> None:
    """No weight of a query that attends it is one, be it the last of many steps or all there is; other queries' are."""
    problem = Case("dot", B=2, T=T, S=S, D=8, dtype=dtype).problem()
    expected = problem.results()["weights"]
    for step in (0, S // 2, S - 1):
        mask = torch.ones(2, T, S, dtype=torch.bool)
        mask[0, 0, step] = False
        mask[1, 0] = torch.arange(S) == step
        memory = problem.tensors["memory"].clone()
        memory[:, step] = math.nan
        problem.options["mask"] = mask
        weights = problem.with_tensors(memory=memory).results()["weights"]
        assert weights[:, 1:].isnan().all()
        assert weights[1, 0, step].isnan()
        others = mask[0, 0]
        torch.testing.assert_close(
            weights[0, 0, others],
            expected[0, 0, others] / (1 - expected[0, 0, step]),
            atol=8 * torch.finfo(dtype).eps,
            rtol=8 * torch.finfo(dtype).eps,
        )


@pytest.mark.parametrize("T", [1, 3, 16, 40], ids="T={}".format)
def test_no_features(T: int) -> None:
    """Every score is an empty sum, 0."""
    context, weights = attn_ext.dot_attention(torch.empty(2, T, 0), torch.empty(2, 32, 0))
    assert context.shape == (2, T, 0)
    assert (weights == 1 / 32).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(40, 33), (200, 96), (40, 1024)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("T", [1, 3], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_the_weight_on_one_step(dtype: torch.dtype, T: int, sizes: tuple[int, int], loss: str) -> None:
    """It passes on nothing: a large scale makes much of what another order of summing would leave of g . m - g . c."""
    S, D = sizes
    scale = 3e6 if dtype == torch.float64 else 3e4  # so that a second step's weight is 0 in float64, too
    assert_accurate(Case("dot", T=T, S=S, D=D, dtype=dtype, loss=loss, scale=scale).problem())


@pytest.mark.numerics
@pytest.mark.parametrize("D", [3, 6, 12, 16, 20, 24, 32, 33, 48], ids="D={}".format)
def test_recomputed_weights_on_one_step(D: int) -> None:
    """Of several groups of rows no weight is known to be 1: g . m and g . c are to be rounded alike."""
    generator = torch.Generator().manual_seed(0)
    query, memory, grad = (torch.randn(32, rows, D, generator=generator) for rows in (1, 200, 1))
    options = {"scale": 3e4, "need_weights": False}

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (query, memory)]
        context, _ = attn_ext.dot_attention(*leaves, **options)
        return torch.autograd.grad(context, leaves, grad.to(dtype))

    fused = gradients(torch.float32)
    with attn_ext.use_backend("reference"):
        truth = gradients(torch.float64)
        _, weights = attn_ext.dot_attention(query.double(), memory.double(), scale=3e4)
    assert weights is not None
    on_one = weights.amax((1, 2)) > 1 - 1e-12
    assert on_one.sum() > 16
    for tensor, exact in zip(fused, truth, strict=True):
        torch.testing.assert_close(tensor[on_one].double(), exact[on_one], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 5, 128], ids="T={}".format)
def test_the_largest_number(T: int) -> None:
    """A share of it is none too large, however products come about."""
    memory = torch.ones(2, 256, 64)
    memory[:, 3, 5] = torch.finfo(memory.dtype).max
    context, _ = attn_ext.dot_attention(torch.zeros(2, T, 64), memory)
    expected = memory.double().mean(1, keepdim=True).expand(2, T, 64)
    torch.testing.assert_close(context.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("masking", ["none", "lengths+rows"])
@pytest.mark.parametrize(
    ("B", "T", "S", "D"),
    [(66, 128, 5, 512), (34, 257, 1, 500), (9, 150, 24, 3200), (33, 5, 130, 1024)],
    ids="{}".format,
)
def test_results_that_go_past_the_caches(B: int, T: int, S: int, D: int, masking: str) -> None:
    """A context and gradients of more than 16 MiB, of few source steps or of few queries."""
    assert_accurate(Case("dot", B=B, T=T, S=S, D=D, masking=masking).problem())


def test_float16_that_is_to_sum_up_in_itself() -> None:
    """PyTorch's setting for GPUs, with which it has no product of halves into float32."""
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    try:
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
        assert_accurate(Case("dot", T=20, S=30, D=16, dtype=torch.float16).problem())
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = before
