"""General attention of more queries than source steps: its keys, weight^T m, are made in the place of weight q."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import attn_ext
from attn_ext import functional
from tests.cases import DTYPES, MASKINGS, Case, assert_accurate, short

# A GPU's are always the queries, as the reference's are.
pytestmark = [pytest.mark.fused, pytest.mark.cpu]


def has_keys(T: int, S: int, Dq: int = 64, Dm: int = 64, dtype: torch.dtype = torch.float32) -> bool:
    query, memory, weight = (torch.zeros(shape, dtype=dtype) for shape in ((8, T, Dq), (8, S, Dm), (Dm, Dq)))
    return functional.has_fewer_keys(query, memory, weight)


def test_float16_has_keys_where_none_can_overflow() -> None:
    query, memory, weight = (torch.ones(shape).half() for shape in ((8, 50, 64), (8, 20, 64), (64, 64)))
    assert functional.has_fewer_keys(query, memory, weight)
    for factor, fits in ((500, True), (520, False), (math.inf, False), (math.nan, False)):
        assert functional.has_fewer_keys(query, memory * factor, weight) == fits
        assert functional.has_fewer_keys(query, memory * -factor, weight) == fits
        assert functional.has_fewer_keys(query, memory, weight * factor) == fits


def test_float16_has_none_of_a_query_without_features() -> None:
    query, memory, weight = torch.zeros(1, 5, 0).half(), torch.ones(1, 3, 2).half(), torch.zeros(2, 0).half()
    context, weights = attn_ext.luong_attention(query, memory, "general", weight=weight)
    torch.testing.assert_close(context, torch.ones_like(context))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize(("T", "S"), [(40, 130), (150, 130), (400, 250), (400, 300)])
@pytest.mark.parametrize("peak", [1.0, 1000.0], ids="peak={:g}".format)
def test_peaked_weights(T: int, S: int, peak: float) -> None:
    """What rounding leaves of a sum of score gradients is not multiplied by what the keys have in common."""
    problem = Case("general", B=1, T=T, S=S, D=8, Dm=64, loss="context").problem()
    problem = problem.with_tensors(memory=peak * problem.tensors["memory"])
    results, own, truth = problem.results(), problem.reference_results(), problem.to(torch.float64).reference_results()
    for name in ("grad query", "grad memory", "grad weight"):
        largest, error, own_error = (
            each.abs().max() for each in (truth[name], results[name] - truth[name], own[name] - truth[name])
        )
        assert error <= 3 * own_error + 1e-6 * largest, name


def test_the_fewer_rows_are_projected() -> None:
    assert has_keys(T=50, S=20)
    assert not has_keys(T=20, S=20)
    assert not has_keys(T=1, S=20)
    assert not has_keys(T=101, S=100)  # one row in a hundred is nothing
    assert has_keys(T=6, S=2)
    assert has_keys(T=120, S=100)
    assert not has_keys(T=120, S=100, dtype=torch.bfloat16)
    assert has_keys(T=120, S=100, Dq=512, Dm=512, dtype=torch.bfloat16)
    # The scores are products of the query's size then, which may be much the larger or the smaller.
    assert has_keys(T=100, S=100, Dm=256)
    assert not has_keys(T=100, S=100, Dm=256, Dq=32, dtype=torch.bfloat16)  # whose rounding is common to all queries
    assert has_keys(T=1000, S=256)
    assert not has_keys(T=1000, S=257)
    assert not has_keys(T=110, S=100, Dq=256)


def test_one_decoder_step_is_projected_itself() -> None:
    query, memory, weight = torch.zeros(2, 4), torch.zeros(2, 0, 6), torch.zeros(6, 4)
    assert not functional.has_fewer_keys(query, memory, weight)


@pytest.fixture
def keys_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that there are some at the small sizes of a test, which are seen to be made."""
    made = []

    def has_fewer_keys(*tensors: Tensor) -> bool:
        made.append(unwatched(*tensors))
        return made[-1]

    unwatched = functional.has_fewer_keys
    monkeypatch.setattr(functional, "has_fewer_keys", has_fewer_keys)
    monkeypatch.setattr(functional, "_KEYS", {})
    yield
    assert any(made)


@pytest.mark.usefixtures("keys_cost_nothing")
@torch.no_grad()
def test_many_queries_of_a_memory_without_a_graph() -> None:
    """No loop's step, though nothing is to be deferred."""
    query, memory, weight, *_ = Case("general", T=70, S=37, D=20, Dm=33).problem().tensors.values()
    expected = attn_ext.dot_attention(query @ weight.t(), memory)
    torch.testing.assert_close(attn_ext.AttentionMemory(memory, "general", weight=weight).attend(query), expected)


@pytest.mark.usefixtures("keys_cost_nothing")
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_against_the_products_as_they_are_written(dtype: torch.dtype, masking: str) -> None:
    problem = Case("general", T=70, S=37, D=20, Dm=33, dtype=dtype, masking=masking).problem()
    assert_accurate(problem)
    exact = problem.to(torch.float64)
    query, memory, weight = exact.tensors.values()
    by_query, _ = attn_ext.dot_attention(query @ weight.t(), memory, **exact.options)
    torch.testing.assert_close(exact.results()["context"], by_query, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("keys_cost_nothing")
@pytest.mark.parametrize("loss", ["both", "no_weights"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_gradients(masking: str, loss: str) -> None:
    problem = Case("general", T=4, S=3, D=2, Dm=3, dtype=torch.float64, masking=masking, loss=loss).problem()

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = problem.function(**dict(zip(problem.tensors, tensors, strict=True)), **problem.options)
        return tuple(output for output in outputs if output is not None)

    leaves = [tensor.requires_grad_() for tensor in problem.tensors.values()]
    assert gradcheck(attend, leaves)
    assert gradgradcheck(attend, leaves)


@pytest.mark.usefixtures("keys_cost_nothing")
@pytest.mark.parametrize("masking", ["lengths", "rows", "lengths+rows"])
def test_nobody_sees_what_is_masked(masking: str) -> None:
    """NaN in rows that nobody may attend reaches no result and no gradient, that of the weight least of all."""
    problem = Case("general", B=3, T=70, S=37, D=20, Dm=33, masking=masking).problem()
    expected = problem.results()
    memory = problem.tensors["memory"].clone()
    hidden = torch.ones(3, 37, dtype=torch.bool)
    if problem.options["lengths"] is not None:
        hidden &= torch.arange(37) < problem.options["lengths"].unsqueeze(1)
    if problem.options["mask"] is not None:
        hidden &= problem.options["mask"]
    memory[~hidden] = float("nan")
    for name, result in problem.with_tensors(memory=memory).results().items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.usefixtures("keys_cost_nothing")
def test_weight_without_a_gradient() -> None:
    """Then nothing is hidden: NaN behind the lengths is projected, and goes no further."""
    problem = Case("general", T=70, S=37, D=20, Dm=33, masking="lengths").problem()
    for spoil in (0.0, float("nan")):
        memory = problem.tensors["memory"].clone()
        memory[problem.options["lengths"] == 0] = spoil
        query, memory = problem.tensors["query"].clone().requires_grad_(), memory.requires_grad_()
        context, _ = attn_ext.luong_attention(
            query, memory, "general", weight=problem.tensors["weight"], **problem.options
        )
        context.square().sum().backward()
        for tensor in (context, query.grad, memory.grad):
            assert tensor is not None
            assert tensor.isfinite().all()


@pytest.mark.usefixtures("keys_cost_nothing")
def test_a_memory_of_many_queries() -> None:
    problem = Case("general", T=70, S=37, D=20, Dm=33, masking="lengths").problem()
    expected = problem.results()

    def attend(query: Tensor, memory: Tensor, weight: Tensor, *, need_weights: bool, **options: Any) -> Any:
        shared = attn_ext.AttentionMemory(memory, "general", weight=weight, **options)
        return attn_ext.luong_attention(query, shared, need_weights=need_weights)

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    outputs = attend(**leaves, **problem.options)
    torch.autograd.backward(outputs, list(problem.grad_outputs.values()))
    torch.testing.assert_close(outputs[0], expected["context"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"grad {name}"])


@pytest.mark.usefixtures("keys_cost_nothing")
def test_an_exported_program_is_for_all_sizes() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attn_ext.LuongAttention("general", 4)

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            return self.attention(query, memory)[0]

    model = Model()
    T, S = torch.export.Dim("T", min=2), torch.export.Dim("S", min=2)
    inputs = torch.randn(2, 7, 4), torch.randn(2, 5, 4)
    program = torch.export.export(model, inputs, dynamic_shapes=({1: T}, {1: S})).module()
    for queries, steps in ((7, 5), (5, 7)):
        query, memory = torch.randn(2, queries, 4), torch.randn(2, steps, 4)
        torch.testing.assert_close(program(query, memory), model(query, memory))


@pytest.mark.usefixtures("keys_cost_nothing")
def test_compiled() -> None:
    """Whole, and for other sizes than those that it was traced with: both ways of projecting."""
    problem = Case("general", T=7, S=5, D=8, Dm=8, masking="lengths").problem()
    compiled = torch.compile(problem.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, S in ((7, 5), (9, 6), (5, 7), (6, 9)):
        each = Case("general", T=T, S=S, D=8, Dm=8, masking="lengths").problem()
        expected = each.results()
        for name, result in replace(each, function=compiled).results().items():
            torch.testing.assert_close(result, expected[name])


@pytest.mark.numerics
@pytest.mark.usefixtures("keys_cost_nothing")
@pytest.mark.parametrize("layout", ["dense", "time-major", "part of a larger one", "every other feature"])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_keys_of_halves_whose_rows_have_much_in_common(dtype: torch.dtype, masking: str, layout: str) -> None:
    """Rounded as they are, they would lose what they differ in, and their gradients' sum what it is to cancel."""
    Dm = 64 if layout == "dense" else 300
    problem = Case("general", B=4, T=70, S=37, D=64, Dm=Dm, dtype=dtype, masking=masking).problem()
    common = 10 * torch.randn(Dm, generator=torch.Generator().manual_seed(0))
    memory = (0.3 * problem.tensors["memory"].float() + common).to(dtype)
    if layout == "time-major":
        memory = memory.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "part of a larger one":
        memory = F.pad(memory, (1, 2, 3, 0))[:, 3:, 1:-2]
    elif layout == "every other feature":
        memory = memory.repeat_interleave(2, dim=2)[..., ::2]
    with torch.autograd.profiler.profile() as profile:
        assert_accurate(problem.with_tensors(memory=memory))
    is_by_kernel = any(event.name.startswith("attn_ext::cpu::centred") for event in profile.function_events)
    assert is_by_kernel == (layout != "every other feature")


@pytest.mark.numerics
@pytest.mark.usefixtures("keys_cost_nothing")
@pytest.mark.parametrize("layout", ["dense", "every other feature"])
@pytest.mark.parametrize("junk", [math.nan, math.inf], ids=str)
def test_what_some_queries_attend_stays_with_them(junk: float, layout: str) -> None:
    """A number that is none in a row of halves reaches the others neither by its keys nor by their average."""
    problem = Case("general", B=2, T=70, S=37, D=64, Dm=64, dtype=torch.bfloat16).problem()
    query, memory, weight = problem.tensors.values()
    mask = torch.ones(2, 70, 37, dtype=torch.bool)
    mask[:, 1:, 5] = False
    _, expected = attn_ext.luong_attention(query, memory, "general", weight=weight, mask=mask)
    memory = memory.clone()
    memory[:, 5, 7] = junk
    if layout == "every other feature":
        memory = memory.repeat_interleave(2, dim=2)[..., ::2]
    _, weights = attn_ext.luong_attention(query, memory, "general", weight=weight, mask=mask)
    assert weights is not None
    assert expected is not None
    assert not weights[:, 0].isfinite().all()
    torch.testing.assert_close(weights[:, 1:], expected[:, 1:], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("large", ["keys", "differences"])
def test_no_key_of_float16_overflows(large: str, each_backend: str) -> None:
    """Where projecting the memory costs less, but its keys, or what it differs by from its average, are too large."""
    generator = torch.Generator().manual_seed(0)
    query = (1e-4 * torch.randn(1, 256, 8, generator=generator)).half()
    weight, memory = torch.randn(64, 8, generator=generator), torch.randn(1, 4, 64, generator=generator)
    if large == "keys":
        weight, memory = (60 * weight).half(), (300 * memory).half()
        assert not (memory @ weight).isfinite().all()
    else:
        weight, memory = (1e-3 * weight).half(), memory.half()
        memory[0, :, 0] = torch.tensor([-5e4, 5e4, 5e4, 5e4])
    context, weights = attn_ext.luong_attention(query, memory, "general", weight=weight)
    assert context.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 256).half(), atol=4e-3, rtol=0)


@pytest.mark.parametrize("junk", [math.nan, math.inf], ids=str)
def test_no_key_of_float16_is_known_by_what_is_hidden(junk: float, each_backend: str) -> None:
    problem = Case("general", B=2, T=256, S=9, D=16, Dm=16, dtype=torch.float16, masking="lengths").problem()
    memory = problem.tensors["memory"].clone()
    memory[1, int(problem.options["lengths"][1]) :] = junk
    expected = problem.results()
    for name, result in problem.with_tensors(memory=memory).results().items():
        torch.testing.assert_close(result, expected[name], atol=4e-3, rtol=4e-3)
