"""The derivative of the ops' backward passes is the reference's. The ops' own derivative is csrc/autograd.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attn_ext import autocast, reference


@cache
def library() -> torch.library.Library:
    """Completes the compiled ops, once they are loaded; what is registered lives as long as the object."""
    library = torch.library.Library("attn_ext", "IMPL")
    for function in (reference.dot_attention, reference.keyed_dot_attention, reference.additive_attention):
        name = f"{function.__name__}_backward"
        op = getattr(torch.ops.attn_ext, name).default
        library.impl(name, _differentiable_backward(op, function), "Autograd")
    return library


def _differentiable_backward(
    op: Callable[..., tuple[Tensor, ...]], function: Callable[..., tuple[Tensor, Tensor | None]]
) -> Callable[..., tuple[Tensor, ...]]:
    """The backward op `op` of `function`; where its result is itself to be differentiated, the reference's."""

    def backward(grad_context: Tensor | None, grad_weights: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
        *inputs, lengths, mask, scale, _, _, logsumexp, wanted = others
        arriving = [grad for grad in (grad_context, grad_weights) if grad is not None]
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (*arriving, *inputs)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(grad_context, grad_weights, *others)
        # A view of each: an argument passed twice (query is memory) keeps its gradients apart.
        inputs = [tensor.view_as(tensor).requires_grad_() for tensor in inputs]
        # As the op does, in the type that it accumulates in, also under the caller's autocast.
        with autocast.disabled(logsumexp):
            accumulated = [tensor.to(logsumexp.dtype) for tensor in inputs]
            outputs = function(
                *accumulated, lengths=lengths, mask=mask, scale=scale, need_weights=grad_weights is not None
            )
            grads = torch.autograd.grad(
                [out for out, grad in zip(outputs, (grad_context, grad_weights), strict=True) if grad is not None],
                [tensor for tensor, want in zip(inputs, wanted, strict=True) if want],
                [grad.to(logsumexp.dtype) for grad in arriving],
                create_graph=True,
                materialize_grads=True,
            )
        left = iter(grads)
        return tuple(next(left) if want else tensor.new_empty(0) for tensor, want in zip(inputs, wanted, strict=True))

    return backward
