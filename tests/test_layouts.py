"""Strides: any view gives the contiguous tensors' numbers, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attn_ext
from benchmarks.peak_memory import extra_bytes
from tests.cases import DTYPES, METHODS, Case, short


def time_major(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def slice_of_wider(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (3, 5), value=float("nan"))[..., 3 : 3 + tensor.shape[-1]]


def slice_of_longer(tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 0, 1, 2), value=float("nan"))[..., 1 : 1 + tensor.shape[-2], :]


def every_second_feature(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def feature_major(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def unaligned(tensor: Tensor) -> Tensor:
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


LAYOUTS = (time_major, slice_of_wider, slice_of_longer, every_second_feature, feature_major, unaligned)


def laid_out(layout: Callable[[Tensor], Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: layout(t) if t.dim() == 3 or layout is unaligned else t for name, t in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("T", [1, 5, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", METHODS)
def test_layout(method: str, dtype: torch.dtype, T: int, layout: Callable[[Tensor], Tensor]) -> None:
    problem = Case(method, B=3, T=T, S=37, D=20, Dm=24, dtype=dtype, masking="lengths+pairs").problem()
    expected = problem.results()
    problem.options["mask"] = layout(problem.options["mask"].to(dtype)) > 0
    laid_out_problem = problem.with_tensors(**laid_out(layout, problem.tensors))
    laid_out_problem.grad_outputs.update(laid_out(layout, problem.grad_outputs))
    torch.testing.assert_close(laid_out_problem.results(), expected)


@pytest.mark.parametrize("T", [1, 5], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_one_memory_for_the_whole_batch(method: str, T: int) -> None:
    """Expanded over the batch (stride 0), as beams share a sentence; so may lengths and mask be."""
    problem = Case(method, B=4, T=T, S=37, D=20).problem()
    problem.options.update(lengths=torch.tensor([30]).expand(4), mask=(torch.arange(37) % 3 > 0).expand(4, T, 37))
    shared = {name: problem.tensors[name][:1] for name in ("memory", "keys", "values") if name in problem.tensors}
    expanded = problem.with_tensors(**{name: tensor.expand(4, -1, -1) for name, tensor in shared.items()})
    copied = problem.with_tensors(**{name: tensor.repeat(4, 1, 1) for name, tensor in shared.items()})
    torch.testing.assert_close(expanded.results(), copied.results())


@pytest.mark.parametrize("T", [1, 5], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_one_row_for_every_step(method: str, T: int) -> None:
    """Stride 0 along T, along S and along the features."""
    problem = Case(method, T=T, S=37, D=20).problem()
    for axis in (1, 2):
        flat = {n: t.narrow(axis, 0, 1).expand_as(t) for n, t in problem.tensors.items() if t.dim() == 3}
        copied = {name: tensor.contiguous() for name, tensor in flat.items()}
        torch.testing.assert_close(
            problem.with_tensors(**flat).results(), problem.with_tensors(**copied).results(), atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
def test_expanded_gradients(method: str) -> None:
    """What .sum().backward() sends back has stride 0 everywhere."""
    problem = Case(method, T=5, S=37, D=20).problem()
    expanded = {name: torch.ones(()).expand(grad.shape) for name, grad in problem.grad_outputs.items()}
    copied = {name: torch.ones(grad.shape) for name, grad in problem.grad_outputs.items()}
    results = []
    for grad_outputs in (expanded, copied):
        problem.grad_outputs.update(grad_outputs)
        results.append(problem.results())
    torch.testing.assert_close(*results)


def peak(function: Callable[..., Any], **arguments: Any) -> int:
    """The bytes that a call holds at its peak beyond what it returns."""
    call = partial(function, **arguments)
    call.active = nullcontext
    return extra_bytes(call)


@pytest.mark.fused
@pytest.mark.cpu  # whose allocations are counted
@pytest.mark.parametrize("T", [1, 5, 70], ids="T={}".format)
@pytest.mark.parametrize("method", METHODS)
def test_a_time_major_view_costs_no_copy(method: str, T: int) -> None:
    """Forward nothing does, with backward nothing of the two ops: a projection's own backward is PyTorch's."""
    problem = Case(method, B=3, T=T, S=37, D=20, Dm=24).problem()
    views = laid_out(time_major, problem.tensors)
    assert peak(problem.function, **views) == peak(problem.function, **problem.tensors)
    if method in ("dot", "additive"):
        assert peak(problem.with_tensors(**views).results) == peak(problem.results)


def test_mask_slices() -> None:
    """Masks and lengths cut from larger ones."""
    problem = Case("dot", B=3, S=37, D=20).problem()
    wide = torch.rand(6, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    lengths = torch.tensor([30, 0, 37, 0, 12, 0])
    views = {"mask": wide[::2, 1:75:2], "lengths": lengths[::2]}
    copies = {name: view.contiguous() for name, view in views.items()}
    for actual, expected in zip(
        *(attn_ext.dot_attention(**problem.tensors, **m) for m in (views, copies)), strict=True
    ):
        assert torch.equal(actual, expected)
