"""Derivatives: against finite differences, one input at a time, twice, and in every way autograd may ask for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import attn_ext
from tests import cases
from tests.cases import DTYPES, MASKINGS, METHODS, Case, Problem, short


def differentiable(problem: Problem) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The call as a function of its tensors alone, as gradcheck takes it."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = problem.function(**dict(zip(problem.tensors, tensors, strict=True)), **problem.options)
        return tuple(output for output in outputs if output is not None)

    return call, [tensor.requires_grad_() for tensor in problem.tensors.values()]


def small(method: str, masking: str, loss: str) -> Problem:
    return Case(method, T=2, S=4, D=3, Dm=2, dtype=torch.float64, masking=masking, loss=loss, scale=0.8).problem()


@pytest.mark.parametrize("loss", ["both", "no_weights"])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("method", METHODS)
class TestFiniteDifferences:
    def test_gradcheck(self, method: str, masking: str, loss: str) -> None:
        assert gradcheck(*differentiable(small(method, masking, loss)))

    def test_gradgradcheck(self, method: str, masking: str, loss: str) -> None:
        assert gradgradcheck(*differentiable(small(method, masking, loss)))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_views(method: str) -> None:
    """Time-major tensors, and every second feature of a wider one."""
    call, tensors = differentiable(small(method, "pairs", "both"))

    def call_on_views(*inputs: Tensor) -> tuple[Tensor, ...]:
        return call(*(t.transpose(0, 1)[..., ::2] if t.dim() == 3 else t for t in inputs))

    views = [
        t.detach().transpose(0, 1).repeat_interleave(2, -1).requires_grad_() if t.dim() == 3 else t for t in tensors
    ]
    assert gradcheck(call_on_views, views)
    assert gradgradcheck(call_on_views, views)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("T", [1, 5], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_each_input_alone(method: str, T: int, dtype: torch.dtype) -> None:
    """A gradient does not depend on which others are asked for; the rest get none."""
    problem = Case(method, T=T, S=37, D=20, dtype=dtype, masking="lengths").problem()
    expected = problem.results()
    for wanted in problem.tensors:
        leaves = {n: t.detach().requires_grad_(n == wanted) for n, t in problem.tensors.items()}
        outputs = problem.function(**leaves, **problem.options)
        # The weights do not depend on additive attention's values, and in the reference have no graph then.
        pairs = zip(outputs, problem.grad_outputs.values(), strict=True)
        torch.autograd.backward(*zip(*((output, grad) for output, grad in pairs if output.requires_grad), strict=True))
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        torch.testing.assert_close(leaves[wanted].grad, expected[f"grad {wanted}"])


def test_weights_without_a_graph(each_backend: str) -> None:
    """Additive attention's weights do not depend on its values: these alone give them no graph."""
    problem = Case("additive").problem()
    leaves = {name: tensor.detach().requires_grad_(name == "values") for name, tensor in problem.tensors.items()}
    context, weights = problem.function(**leaves, **problem.options)
    assert (context.requires_grad, weights.requires_grad) == (True, False)


@pytest.mark.parametrize("method", METHODS)
def test_retained_graph(method: str) -> None:
    problem = Case(method, masking="lengths").problem()
    leaves = [tensor.requires_grad_() for tensor in problem.tensors.values()]
    outputs = problem.function(**problem.tensors, **problem.options)
    first, second = (
        torch.autograd.grad(outputs, leaves, list(problem.grad_outputs.values()), retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def kept_shapes(problem: Problem, need_weights: bool = True) -> list[list[int]]:
    """Of the tensors that wait for the backward."""
    shapes = []
    tensors = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}
    watch = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: shapes.append(list(tensor.shape)) or tensor, lambda tensor: tensor
    )
    with watch:
        problem.function(**tensors, need_weights=need_weights)
    return shapes


@pytest.mark.fused
@pytest.mark.parametrize("T", [1, 20, 70], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_nobody_asked_for_are_not_kept(method: str, T: int) -> None:
    """Nothing of the size [B, T, S] waits for the backward, which takes them anew."""
    problem = Case(method, T=T, S=300, D=4, Dm=4).problem()
    assert [2, T, 300] in kept_shapes(problem, need_weights=True)
    shapes = kept_shapes(problem, need_weights=False)
    assert shapes
    assert not any(300 in shape and shape[-1] != 4 for shape in shapes)


@pytest.mark.fused
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", METHODS)
def test_a_context_that_no_backward_reads_is_not_kept(method: str, dtype: torch.dtype) -> None:
    """On a CPU it is read of more steps than are worked on at once, on a GPU of one query."""
    on_cpu = cases.KERNELS == "cpu"

    def kept(T: int, S: int) -> int:
        return kept_shapes(Case(method, T=T, S=S, D=6, Dm=6, dtype=dtype).problem()).count([2, T, 6])

    queries = 2 if method in ("general", "concat") else 1  # of the same size, and their projection
    assert kept(20, 30) == queries
    assert kept(1, 30) == queries + (not on_cpu)
    assert kept(1, 300) == queries + 1
    assert kept(20, 300) == queries + on_cpu


@pytest.mark.fused
@pytest.mark.parametrize("method", METHODS)
def test_input_changed_before_backward(method: str) -> None:
    """The backward pass reads its inputs again: one that changed in place is an error, not a wrong gradient."""
    problem = Case(method).problem()
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}
    query = leaves["query"] * 1
    context, _ = problem.function(**leaves | {"query": query}, **problem.options)
    with torch.no_grad():
        query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_create_graph_gives_the_same_gradients(method: str) -> None:
    """The differentiable backward pass is another code path; its first-order result is the fused one's."""
    problem = Case(method, S=37, D=20, dtype=torch.float64, masking="lengths+pairs").problem()
    leaves = [tensor.requires_grad_() for tensor in problem.tensors.values()]
    outputs = problem.function(**problem.tensors, **problem.options)
    grad_outputs = list(problem.grad_outputs.values())
    plain = torch.autograd.grad(outputs, leaves, grad_outputs, retain_graph=True)
    differentiable = torch.autograd.grad(outputs, leaves, grad_outputs, create_graph=True)
    assert all(grad.requires_grad for grad in differentiable)
    torch.testing.assert_close(plain, tuple(grad.detach() for grad in differentiable))


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_second_derivative_where_query_is_memory(method: str) -> None:
    tensors = Case(method, D=4, Dm=4, dtype=torch.float64).problem().tensors
    memory = tensors.pop("memory").requires_grad_()
    tensors.pop("query")

    def attend(memory: Tensor) -> tuple[Tensor, Tensor | None]:
        return attn_ext.luong_attention(memory, memory, method, **tensors)

    assert gradcheck(attend, memory)
    assert gradgradcheck(attend, memory)
