"""What may not be attended: exact zeros, rows with nothing to attend, and whatever stands behind a mask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.cases import DTYPES, LOSSES, METHODS, Case, Problem, assert_accurate, assert_same, short

# Which tensors have a row per source step.
SOURCE_SIDE = ("memory", "keys", "values")


def never_attended(problem: Problem) -> torch.Tensor:
    """[B, S]: what `lengths` or a mask keep from every query."""
    lengths, mask = problem.options["lengths"], problem.options["mask"]
    B, S = problem.tensors[next(name for name in SOURCE_SIDE if name in problem.tensors)].shape[:2]
    hidden = torch.zeros(B, S, dtype=torch.bool)
    if lengths is not None:
        hidden |= torch.arange(S) >= lengths.unsqueeze(1)
    if mask is not None:
        hidden |= ~(mask if mask.dim() == 2 else mask.any(1))
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


@pytest.mark.numerics
@pytest.mark.parametrize("masking", ["rows", "pairs"])
@pytest.mark.parametrize("every", [2, 12, 15, 40], ids="every={}".format)
@pytest.mark.parametrize("T", [1, 5, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", ["dot", "additive"])
def test_holes_at_any_distance(method: str, dtype: torch.dtype, T: int, every: int, masking: str) -> None:
    """A row's values go to and from their places one by one between near holes, by vectors between far ones."""
    problem = Case(method, T=T, S=300, D=20, dtype=dtype, masking=masking).problem()
    mask = (torch.arange(300) % every > 0).expand_as(problem.options["mask"])
    assert_accurate(replace(problem, options=problem.options | {"mask": mask}))


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
@pytest.mark.parametrize("T", [1, 5, 33, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", [*METHODS, "keyed_dot"])
def test_a_step_that_every_query_masks_is_not_seen(
    method: str, dtype: torch.dtype, T: int, value: float, each_backend: str
) -> None:
    """By a mask [B, T, S], too. The gradients of its neighbour, with which it had shared a reciprocal, were NaN."""
    problem = Case(method, B=3, T=T, S=70, D=20, dtype=dtype, masking="pairs").problem()
    problem.options["mask"][..., 8] = False
    for name in SOURCE_SIDE:
        if name in problem.tensors:
            tensor = problem.tensors[name].clone()
            tensor[:, 8] = value
            problem = problem.with_tensors(**{name: tensor})
    assert all(result.isfinite().all() for result in problem.results().values())
    assert_accurate(problem)


@pytest.mark.parametrize("masking", ["none", "lengths", "pairs"])
@pytest.mark.parametrize("T", [1, 5, 33], ids="T={}".format)
@pytest.mark.parametrize("S", [1, 70, 300], ids="S={}".format)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_scores_that_all_overflow_attend_nothing(
    dtype: torch.dtype, loss: str, S: int, T: int, masking: str, each_backend: str
) -> None:
    """As in PyTorch's own attention: where every score is -inf, the weights, the context and all gradients are 0."""
    problem = Case("dot", B=2, T=T, S=S, D=20, dtype=dtype, masking=masking, loss=loss).problem()
    query = torch.full_like(problem.tensors["query"], 1e-15)
    query[:, -1] = -1e30
    huge = problem.with_tensors(query=query, memory=problem.tensors["memory"].abs() * 1e15 + 1e15)
    results = huge.results()
    assert all(result.isfinite().all() for result in results.values())
    for name in {"weights", "context", "grad query"} & results.keys():
        assert (results[name][:, -1] == 0).all(), name


@pytest.mark.parametrize("need_weights", [True, False], ids=["", "no weights"])
@pytest.mark.parametrize("T", [1, 5], ids="T={}".format)
@pytest.mark.parametrize(("S", "A"), [(5, 20), (70, 64), (70, 256)], ids=str)
def test_additive_scores_that_all_overflow_attend_nothing(
    S: int, A: int, T: int, need_weights: bool, each_backend: str
) -> None:
    """By their scale."""
    case = Case("additive", T=T, S=S, D=A, Dm=A, loss="both" if need_weights else "no_weights", scale=1e38)
    problem = case.problem()
    sunk = {name: torch.full_like(tensor, -3.0) for name, tensor in problem.tensors.items() if name != "values"}
    results = problem.with_tensors(**sunk | {"v": torch.full((A,), 9.0)}).results()
    for name in results.keys() - {"grad values"}:
        assert (results[name] == 0).all(), name
    assert results["grad values"].isfinite().all()


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


@pytest.mark.fused
@pytest.mark.cpu
@pytest.mark.parametrize("masking", ["rows", "pairs"])
@pytest.mark.parametrize("T", [1, 3, 33], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_any_byte_but_0_is_true(method: str, T: int, masking: str) -> None:
    """As in a mask of bytes that is viewed as bool."""
    problem = Case(method, B=3, T=T, S=300, D=20, masking=masking).problem()
    mask = problem.options["mask"]
    others = (mask.to(torch.uint8) * torch.arange(1, 256).repeat(2)[:300].to(torch.uint8)).view(torch.bool)
    assert_same(replace(problem, options=problem.options | {"mask": others}).results(), problem.results())


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


@pytest.mark.parametrize("masking", ["lengths", "rows", "pairs"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("T", [1, 3, 20], ids="T={}".format)
@pytest.mark.parametrize("need_weights", [True, False], ids=["", "no weights"])
@pytest.mark.parametrize("method", METHODS)
def test_a_query_that_is_no_number(
    method: str, need_weights: bool, T: int, threads: int, masking: str, each_backend: str
) -> None:
    """Nor are its context and the weights of what it attends; what is hidden keeps a 0, where whole parts are, too."""
    torch.set_num_threads(threads)
    S = 2048
    problem = Case(method, B=1, T=T, S=S, D=64, Dm=64, loss="both" if need_weights else "no_weights").problem()
    allowed = torch.arange(S) < S // 2 if masking == "lengths" else torch.arange(S) >= S // 2
    problem.options["lengths"] = torch.tensor([S // 2]) if masking == "lengths" else None
    problem.options["mask"] = {"lengths": None, "rows": allowed[None], "pairs": allowed.expand(1, T, S)}[masking]
    clean = problem.results()
    query = problem.tensors["query"].clone()
    query[0, -1] = math.nan
    results = problem.with_tensors(query=query).results()
    assert results["context"][0, -1].isnan().all()
    torch.testing.assert_close(results["context"][0, :-1], clean["context"][0, :-1])
    if need_weights:
        assert torch.equal(results["weights"][0, -1].isnan(), allowed)
        assert (results["weights"][0, -1, ~allowed] == 0).all()
        torch.testing.assert_close(results["weights"][0, :-1], clean["weights"][0, :-1])
    of_values = "grad values" if method == "additive" else "grad memory"
    assert (results[of_values][0, ~allowed] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("masking", ["lengths", "rows", "pairs"])
@pytest.mark.parametrize("T", [1, 5, 33], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", [*METHODS, "keyed_dot"])
def test_an_incoming_gradient_that_is_no_number(
    method: str, dtype: torch.dtype, T: int, masking: str, value: float, each_backend: str
) -> None:
    """Rows that no query may attend keep a gradient of 0. (That of the root of a context of 0, say, is infinite.)"""
    problem = Case(method, B=3, T=T, S=70, D=20, dtype=dtype, masking=masking).problem()
    if masking == "pairs":
        problem.options["mask"][1, :, 30:50] = False
    hidden = never_attended(problem)
    assert hidden.any()
    of_context = problem.grad_outputs["context"].clone()
    of_context[:, -1] = value
    results = replace(problem, grad_outputs=problem.grad_outputs | {"context": of_context}).results()
    source_side = [name for name in problem.tensors if name in SOURCE_SIDE]
    assert any(not results[f"grad {name}"].isfinite().all() for name in source_side)
    for name in source_side:
        assert (results[f"grad {name}"][hidden] == 0).all(), name


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("masking", ["lengths", "rows", "pairs"])
@pytest.mark.parametrize("D", [6, 64], ids="D={}".format)
@pytest.mark.parametrize("T", [1, 5, 33], ids="T={}".format)
def test_a_v_that_is_no_number(T: int, D: int, masking: str, value: float, each_backend: str) -> None:
    """Nor is any context; rows that no query may attend have a gradient of 0 all the same."""
    problem = Case("additive", B=3, T=T, S=70, D=D, Dm=D, masking=masking).problem()
    if masking == "pairs":
        problem.options["mask"][1, :, 30:50] = False
    results = problem.with_tensors(v=torch.full((D,), value)).results()
    for name in ("keys", "values"):
        assert (results[f"grad {name}"][never_attended(problem)] == 0).all(), name


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("T", [1, 3, 20], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_no_number(method: str, T: int, threads: int, each_backend: str) -> None:
    """Whoever attends it has no context that is one, whatever else is attended, and in however many parts."""
    torch.set_num_threads(threads)
    S = 2048
    problem = Case(method, B=1, T=T, S=S, D=64, Dm=64).problem()
    allowed = torch.arange(S) >= S - 3
    allowed[S // 2 + 5] = True
    problem.options["mask"] = allowed[None]
    for name in SOURCE_SIDE:
        if name in problem.tensors and name != "values":
            tensor = problem.tensors[name].clone()
            tensor[0, S // 2 + 5] = math.nan
            problem = problem.with_tensors(**{name: tensor})
    results = problem.results()
    assert results["context"].isnan().all()
    assert torch.equal(results["weights"].isnan(), allowed.expand(1, T, S))
