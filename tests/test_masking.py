"""What may not be attended: exact zeros, rows with nothing to attend, and whatever stands behind a mask."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cases import DTYPES, LOSSES, METHODS, Case, Problem, assert_accurate, assert_same, short

# Which tensors have a row per source step.
SOURCE_SIDE = ("memory", "keys", "values")


def never_attended(problem: Problem) -> torch.Tensor:
    """[B, S]: behind `lengths` or a [B, S] mask."""
    lengths, mask = problem.options["lengths"], problem.options["mask"]
    B, S = problem.tensors[next(name for name in SOURCE_SIDE if name in problem.tensors)].shape[:2]
    hidden = torch.zeros(B, S, dtype=torch.bool)
    if lengths is not None:
        hidden |= torch.arange(S) >= lengths.unsqueeze(1)
    if mask is not None and mask.dim() == 2:
        hidden |= ~mask
    return hidden


@pytest.mark.parametrize("masking", ["lengths", "rows", "pairs", "lengths+rows", "lengths+pairs"])
@pytest.mark.parametrize("T", [1, 33], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", METHODS)
def test_masked_weights_are_exactly_zero(
    method: str, dtype: torch.dtype, T: int, masking: str, each_backend: str
) -> None:
    problem = Case(method, B=3, T=T, S=70, D=20, dtype=dtype, masking=masking).problem()
    weights = problem.results()["weights"]
    allowed = ~never_attended(problem).unsqueeze(1).expand_as(weights)
    mask = problem.options["mask"]
    if mask is not None and mask.dim() == 3:
        allowed = allowed & mask
    assert (weights[~allowed] == 0).all()
    assert (weights >= 0).all()
    sums = allowed.any(-1).to(torch.float64)
    torch.testing.assert_close(weights.double().sum(-1), sums, atol=70 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("masking", ["lengths", "rows", "lengths+rows", "lengths+pairs"])
@pytest.mark.parametrize("T", [1, 33], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_behind_the_mask_is_seen(
    method: str, dtype: torch.dtype, T: int, masking: str, each_backend: str
) -> None:
    """NaN and infinity there change no bit of any result or gradient, and their own gradient is exactly 0."""
    problem = Case(method, B=3, T=T, S=70, D=20, dtype=dtype, masking=masking).problem()
    hidden = never_attended(problem)
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(24)[:70].unsqueeze(-1)  # [S, 1]
    source_side = {name: tensor for name, tensor in problem.tensors.items() if name in SOURCE_SIDE}
    poisoned = {name: torch.where(hidden.unsqueeze(-1), poison, tensor) for name, tensor in source_side.items()}
    results = problem.with_tensors(**poisoned).results()
    assert_same(results, problem.results())
    for name in source_side:
        assert (results[f"grad {name}"][hidden] == 0).all(), name


@pytest.mark.fused
@pytest.mark.cpu  # elsewhere a look would wait for the device
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("behind", [0.0, 1e30, math.nan, math.inf], ids=str)
def test_a_memory_is_copied_only_if_something_is_to_be_hidden(behind: float, precision: str) -> None:
    """Its rows from the product that is the weight's gradient, where PyTorch's multiplies them by gradients of 0."""
    torch.set_float32_matmul_precision(precision)  # of factors of bfloat16 the products are PyTorch's
    problem = Case("concat", B=3, T=5, S=37, D=20, masking="lengths").problem()
    memory = problem.tensors["memory"].masked_fill(never_attended(problem).unsqueeze(-1), behind)
    with torch.autograd.profiler.profile() as profile:
        problem.with_tensors(memory=memory).results()
    copies = sum(event.name == "aten::masked_fill" for event in profile.function_events)
    leaves_rows_out = precision == "highest" and torch.ops.attn_ext.cpu_multiplies()
    assert copies == (0 if math.isfinite(behind) or leaves_rows_out else 1)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("T", [5, 33, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_key_that_every_query_masks_is_not_seen(dtype: torch.dtype, T: int, value: float, each_backend: str) -> None:
    """By a mask [B, T, S], too. The gradients of its neighbour, with which it had shared a reciprocal, were NaN."""
    problem = Case("additive", B=3, T=T, S=70, D=20, dtype=dtype, masking="pairs").problem()
    problem.options["mask"][..., 8] = False
    keys = problem.tensors["keys"].clone()
    keys[:, 8] = value
    hidden = problem.with_tensors(keys=keys)
    assert all(result.isfinite().all() for result in hidden.results().values())
    assert_accurate(hidden)


@pytest.mark.parametrize("masking", ["none", "lengths", "pairs"])
@pytest.mark.parametrize("T", [1, 5, 33], ids="T={}".format)
@pytest.mark.parametrize("S", [1, 70, 300], ids="S={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_scores_that_all_overflow_attend_nothing(
    dtype: torch.dtype, S: int, T: int, masking: str, each_backend: str
) -> None:
    """As in PyTorch's own attention: where every score is -inf, the weights, the context and all gradients are 0."""
    problem = Case("dot", B=2, T=T, S=S, D=20, dtype=dtype, masking=masking).problem()
    query = torch.full_like(problem.tensors["query"], 1e-15)
    query[:, -1] = -1e30
    huge = problem.with_tensors(query=query, memory=problem.tensors["memory"].abs() * 1e15 + 1e15)
    results = huge.results()
    assert all(result.isfinite().all() for result in results.values())
    for name in ("weights", "context", "grad query"):
        assert (results[name][:, -1] == 0).all(), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("what", ["length 0", "row mask", "pair mask"])
@pytest.mark.parametrize("T", [1, 33], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_attend(method: str, T: int, what: str, loss: str, each_backend: str) -> None:
    """Weights 0, context 0, gradients 0 in the middle batch element, and never NaN."""
    problem = Case(method, B=3, T=T, S=40, D=20, loss=loss).problem()
    if what == "length 0":
        problem.options["lengths"] = torch.tensor([40, 0, 13])
    else:
        problem.options["mask"] = torch.ones((3, 40) if what == "row mask" else (3, T, 40), dtype=torch.bool)
        problem.options["mask"][1] = False
    results = problem.results()
    for name, result in results.items():
        assert result.isfinite().all(), name
        if result.dim() == 3 and name != "grad weight":
            assert (result[1] == 0).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_some_queries_have_nothing_to_attend(method: str, each_backend: str) -> None:
    """A [B, T, S] mask may leave one decoder step of many without a source."""
    problem = Case(method, T=33, S=40, D=20, masking="pairs").problem()
    problem.options["mask"][0, 7] = False
    results = problem.results()
    for name in ("context", "weights", "grad query"):
        assert (results[name][0, 7] == 0).all(), name
        assert (results[name][0, 8] != 0).any(), name
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("method", METHODS)
def test_masks_agree(method: str, each_backend: str) -> None:
    """One set of allowed steps, said in four ways."""
    problem = Case(method, B=3, T=5, S=40, D=20).problem()
    lengths = torch.tensor([40, 17, 0])
    mask = torch.arange(40) < lengths.unsqueeze(1)
    ways = (
        {"lengths": lengths},
        {"mask": mask},
        {"mask": mask.unsqueeze(1).expand(3, 5, 40)},
        {"lengths": torch.tensor([40, 20, 30]), "mask": mask},
    )
    first, *others = (
        Problem(problem.function, problem.tensors, problem.options | way, problem.grad_outputs).results()
        for way in ways
    )
    for other in others:
        torch.testing.assert_close(other, first)
