"""What is timed: implementations behind the signature of attn_ext.luong_attention, and the calls made of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import attn_ext
from benchmarks.shapes import Shape

METHODS = ("dot", "general", "concat")
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Implementation:
    """`attend(query, memory, method, **parameters)` -> context, weights; `active` surrounds its calls, untimed."""

    name: str
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    active: Callable[[], AbstractContextManager[object]] = nullcontext


FUSED = Implementation("fused", attn_ext.luong_attention, partial(attn_ext.use_backend, "fused"))
REFERENCE = Implementation("reference", attn_ext.luong_attention, partial(attn_ext.use_backend, "reference"))
PEERS = (REFERENCE,)


class Call:
    """One implementation on one problem in one direction: calling it does the work once and returns all it computed."""

    def __init__(self, implementation: Implementation, method: str, shape: Shape, direction: str) -> None:
        self.name = implementation.name
        self.active = implementation.active
        self._attend = partial(implementation.attend, method=method)
        self._with_backward = direction == "forward+backward"
        self._inputs = inputs(method, shape, requires_grad=self._with_backward)
        self._grad_context = torch.randn(shape.B, shape.T, shape.H, generator=torch.Generator().manual_seed(1))

    def __call__(self) -> tuple[Tensor, ...]:
        context, weights = self._attend(**self._inputs)
        if not self._with_backward:
            return context, weights
        return context, weights, *torch.autograd.grad(context, tuple(self._inputs.values()), self._grad_context)


def inputs(method: str, shape: Shape, requires_grad: bool) -> dict[str, Tensor]:
    """Random ones, the same for every implementation, with scores of order 1."""
    generator = torch.Generator().manual_seed(0)
    B, T, S, H = shape.sizes

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * spread).requires_grad_(requires_grad)

    tensors = {"query": normal(B, T, H, spread=H**-0.5), "memory": normal(B, S, H)}
    if method == "general":
        tensors["weight"] = normal(H, H, spread=H**-0.5)
    elif method == "concat":
        tensors |= {"weight": normal(H, 2 * H, spread=H**-0.5), "v": normal(H, spread=H**-0.5), "bias": normal(H)}
    return tensors
