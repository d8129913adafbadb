"""The numbers: the backend in force against the float64 reference, at sizes that cross every tile boundary."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from _pytest.mark import ParameterSet

import attn_ext
from tests.cases import DTYPES, LOSSES, MASKINGS, METHODS, Case, assert_accurate, short

# The kernels' boundaries: vectors of 4, 8 and 16 floats, up to four of them abreast, of which the last may be partial;
# tiles of 32 source rows and more, panels for 16, 64 queries.
S_SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257)
D_SIZES = (1, 3, 8, 15, 16, 17, 32, 60, 64, 100, 513)
T_SIZES = (1, 2, 5, 33, 65)
OPS = ("dot", "keyed_dot", "additive")


def full_grid(method: str, dtype: torch.dtype) -> list[Case]:
    return [_case(method, S, D, T, dtype) for S, D, T in product(S_SIZES, D_SIZES, T_SIZES)]


def pairs_grid(method: str, dtype: torch.dtype) -> list[Case]:
    """A Latin square: every pair of sizes, at a fifth of the full grid."""
    shift = DTYPES.index(dtype)
    return [
        _case(method, S, D, T_SIZES[(i + j + shift) % len(T_SIZES)], dtype)
        for (i, S), (j, D) in product(enumerate(S_SIZES), enumerate(D_SIZES))
    ]


def _case(method: str, S: int, D: int, T: int, dtype: torch.dtype) -> Case:
    """The sizes, with the rest of a call drawn at random."""
    draw = random.Random(f"{method} {S} {D} {T} {dtype}")
    return Case(
        method,
        B=draw.choice((1, 2, 3)),
        T=T,
        S=S,
        D=D,
        Dm=draw.choice(D_SIZES),
        dtype=dtype,
        masking=draw.choice(MASKINGS),
        loss=draw.choice(tuple(LOSSES)),
        scale=draw.choice((None, None, 0.5, -1.5, 0.0)),
    )


@pytest.mark.parametrize("case", [c for op in OPS for c in full_grid(op, torch.float32)], ids=str)
def test_sizes(case: Case) -> None:
    assert_accurate(case.problem())


def some_everywhere(cases: list[Case]) -> list[ParameterSet]:
    """Every fourth case, which is all sizes in turn, also runs under the other instruction sets."""
    return [pytest.param(case, marks=[] if i % 4 else pytest.mark.numerics) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    "case", some_everywhere([c for op in OPS for dtype in DTYPES[1:] for c in pairs_grid(op, dtype)]), ids=str
)
def test_sizes_in_other_dtypes(case: Case) -> None:
    assert_accurate(case.problem())


def many_queries(op: str, dtype: torch.dtype) -> list[Case]:
    """From 64 queries or steps on products take panels, 64 wide, of tiles of 256 steps or chunks of 128 queries."""
    sizes = product((15, 63, 64, 129), (64, 257, 520), (64, 65, 130))
    return [_case(op, S, D, T, dtype) for T, S, D in sizes]


@pytest.mark.parametrize(
    "case", some_everywhere([c for op in OPS for dtype in DTYPES[:3] for c in many_queries(op, dtype)]), ids=str
)
def test_sizes_with_many_queries(case: Case) -> None:
    assert_accurate(case.problem())


@pytest.mark.parametrize(
    "case", some_everywhere([c for m in ("general", "concat") for c in pairs_grid(m, torch.float32)]), ids=str
)
def test_sizes_of_projected_methods(case: Case) -> None:
    assert_accurate(case.problem())


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", METHODS)
def test_options(method: str, dtype: torch.dtype, masking: str) -> None:
    for loss, scale in product(LOSSES, (None, 0.3)):
        assert_accurate(Case(method, T=5, S=37, D=24, dtype=dtype, masking=masking, loss=loss, scale=scale).problem())


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(
    "sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 5), (0, 3, 0), (2, 0, 0), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_empty(method: str, sizes: tuple[int, int, int], masking: str) -> None:
    for loss in LOSSES:
        assert_accurate(Case(method, *sizes, masking=masking, loss=loss).problem())


@pytest.mark.parametrize("masking", ["none", "lengths", "pairs"])
def test_no_features(masking: str) -> None:
    """Scores of D = 0 are all 0: the weights are uniform."""
    for op in OPS:
        assert_accurate(Case(op, D=0, masking=masking).problem())
        assert_accurate(Case(op, Dm=0).problem())


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("size", ["3x33x64", "2x5x17"])
def test_query_is_memory(size: str, dtype: torch.dtype, masking: str) -> None:
    """Self-attention: one tensor, whose gradient is the sum of both roles'."""
    B, S, D = map(int, size.split("x"))
    problem = Case("dot", B, S, S, D, dtype=dtype, masking=masking).problem()
    query = problem.tensors["query"].requires_grad_()
    apart = {"query": query.detach().requires_grad_(), "memory": query.detach().requires_grad_()}
    for memory in ({"query": query, "memory": query}, apart):
        context, weights = attn_ext.dot_attention(**memory, **problem.options)
        torch.autograd.backward([context, weights], list(problem.grad_outputs.values()))
    assert query.grad is not None
    torch.testing.assert_close(query.grad, apart["query"].grad + apart["memory"].grad)


@pytest.mark.parametrize("method", METHODS)
def test_one_decoder_step(method: str, each_backend: str) -> None:
    """A query [B, D] is one of T = 1."""
    problem = Case(method, B=3, T=1, masking="lengths+pairs").problem()
    context, weights = problem.function(**problem.tensors, **problem.options)
    one_step = problem.tensors | {"query": problem.tensors["query"].squeeze(1)}
    step_context, step_weights = problem.function(**one_step, **problem.options)
    assert torch.equal(step_context, context.squeeze(1))
    assert torch.equal(step_weights, weights.squeeze(1))


@pytest.mark.parametrize("method", METHODS)
def test_no_weights(method: str, each_backend: str) -> None:
    problem = Case(method, loss="no_weights").problem()
    for query in (problem.tensors["query"], problem.tensors["query"][:, 0]):
        assert problem.function(**problem.tensors | {"query": query}, **problem.options)[1] is None


def test_luong_attention_defaults_to_dot() -> None:
    problem = Case("dot", masking="lengths+rows", scale=0.7).problem()
    for method in ((), ("dot",)):
        actual = attn_ext.luong_attention(*problem.tensors.values(), *method, **problem.options)
        expected = attn_ext.dot_attention(*problem.tensors.values(), **problem.options)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "kind", [list, tuple, torch.tensor, *(lambda n, d=d: torch.tensor(n, dtype=d) for d in (torch.int32, torch.uint8))]
)
def test_lengths_in_any_integers(kind: type, each_backend: str) -> None:
    problem = Case("dot", B=3).problem()
    expected = attn_ext.dot_attention(**problem.tensors, lengths=torch.tensor([5, 0, 2]))
    actual = attn_ext.dot_attention(**problem.tensors, lengths=kind([5, 0, 2]))
    assert all(map(torch.equal, actual, expected))
