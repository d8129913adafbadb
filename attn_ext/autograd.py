"""The autograd Function over torch.ops.attn_ext.*, behind the reference's signatures.

It saves the inputs, the context, the weights where the caller keeps them, and the log-sum-exp of the scores [B, T],
from which the backward op recomputes the weights where not. The ops' results for halves are float32, as accumulated:
the caller gets them rounded, the backward whole. Double backward differentiates the reference instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from attn_ext import reference


@dataclass(frozen=True)
class _Op:
    """An op is its forward and its backward; `reference` is what they compute."""

    name: str
    reference: Callable[..., tuple[Tensor, Tensor | None]]
    scored: int  # so many of the inputs, the first, make the scores; the weights depend on no other

    @cached_property
    def forward(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        return getattr(torch.ops.attn_ext, self.name).default

    @cached_property
    def backward(self) -> Callable[..., tuple[Tensor, ...]]:
        return getattr(torch.ops.attn_ext, f"{self.name}_backward").default


_DOT = _Op("dot_attention", reference.dot_attention, scored=2)
_ADDITIVE = _Op("additive_attention", reference.additive_attention, scored=3)


def dot_attention(
    query: Tensor,
    memory: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attn_ext.reference.dot_attention`, fused."""
    return _run(_DOT, lengths, mask, scale, need_weights, query, memory)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attn_ext.reference.additive_attention`, fused."""
    return _run(_ADDITIVE, lengths, mask, scale, need_weights, query, keys, v, values)


def _run(
    op: _Op, lengths: Tensor | None, mask: Tensor | None, scale: float, need_weights: bool, *inputs: Tensor
) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Attention.apply(op, lengths, mask, scale, need_weights, *inputs)
    # Without a graph, the Function's bookkeeping would be most of a small call's time.
    context, weights, _ = op.forward(*inputs, lengths, mask, scale, need_weights)
    dtype = inputs[0].dtype
    return context.to(dtype), weights.to(dtype) if need_weights else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        op: _Op,
        lengths: Tensor | None,
        mask: Tensor | None,
        scale: float,
        need_weights: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        context, weights, logsumexp = op.forward(*inputs, lengths, mask, scale, need_weights)
        ctx.op, ctx.scale, ctx.need_weights = op, scale, need_weights
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, mask, context, weights if need_weights else None, logsumexp, *inputs)
        dtype = inputs[0].dtype
        if not need_weights:
            return context.to(dtype), None
        weights = weights.to(dtype)
        if not any(ctx.needs_input_grad[5 : 5 + op.scored]):
            ctx.mark_non_differentiable(weights)
        return context.to(dtype), weights

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        lengths, mask, context, weights, logsumexp, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        if grad_context is None and grad_weights is None:
            grads: tuple[Tensor | None, ...] = (None,) * len(inputs)
        elif torch.is_grad_enabled():  # create_graph=True: this backward is itself to be differentiated
            options = {"lengths": lengths, "mask": mask, "scale": ctx.scale, "need_weights": ctx.need_weights}
            grads = _differentiable_backward(ctx.op, inputs, options, (grad_context, grad_weights), wanted)
        else:
            computed = ctx.op.backward(
                grad_context, grad_weights, *inputs, lengths, mask, ctx.scale, context, weights, logsumexp, wanted
            )
            grads = tuple(grad if want else None for grad, want in zip(computed, wanted, strict=True))
        return (None, None, None, None, None, *grads)


def _differentiable_backward(
    op: _Op,
    inputs: list[Tensor],
    options: dict[str, Any],
    grad_outputs: tuple[Tensor | None, Tensor | None],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    # A view of each: an argument passed twice (query is memory) keeps its gradients apart.
    inputs = [tensor.view_as(tensor) for tensor in inputs]
    outputs = op.reference(*inputs, **options)
    with_grad = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    differentiated = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in with_grad],
            differentiated,
            [grad for _, grad in with_grad],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(grads) if want else None for want in wanted)
