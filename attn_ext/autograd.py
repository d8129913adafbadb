"""The derivative of the op's backward pass is the reference's. The op's own derivative is csrc/autograd.cpp."""

from __future__ import annotations

from functools import cache
from itertools import compress

import torch
from torch import Tensor

from attn_ext import autocast, reference


@cache
def library() -> torch.library.Library:
    """Completes the compiled ops, once they are loaded; what is registered lives as long as the object."""
    library = torch.library.Library("attn_ext", "IMPL")
    library.impl("attention_backward", _attention_backward, "Autograd")
    return library


def _attention_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    keys: Tensor | None,
    v: Tensor | None,
    prepared_keys: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    context: Tensor | None,
    weights: Tensor | None,
    logsumexp: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The backward op; where its result is itself to be differentiated, the reference's gradients."""
    inputs = (query, memory, keys, v)
    arriving = [grad for grad in (grad_context, grad_weights) if grad is not None]
    given = [*arriving, *(tensor for tensor in inputs if tensor is not None)]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.attn_ext.attention_backward.default(
                *(grad_context, grad_weights, *inputs, prepared_keys, lengths, mask, scale),
                *(context, weights, logsumexp, wanted),
            )
    wants = [want and tensor is not None for want, tensor in zip(wanted[:-1], inputs, strict=True)]
    if wanted[-1]:
        raise NotImplementedError("attention_backward: the gradient of the scores has no derivative")
    # A view of each: an argument passed twice (query is memory) keeps its gradients apart.
    leaves = [None if tensor is None else tensor.view_as(tensor).requires_grad_() for tensor in inputs]
    # As the op does, in the type that it accumulates in, also under the caller's autocast.
    with autocast.disabled(logsumexp):
        accumulated = [None if leaf is None else leaf.to(logsumexp.dtype) for leaf in leaves]
        outputs = reference.attention(
            *accumulated, lengths=lengths, mask=mask, scale=scale, need_weights=grad_weights is not None
        )
        grads = torch.autograd.grad(
            [out for out, grad in zip(outputs, (grad_context, grad_weights), strict=True) if grad is not None],
            list(compress(leaves, wants)),
            [grad.to(logsumexp.dtype) for grad in arriving],
            create_graph=True,
            materialize_grads=True,
        )
    left = iter(grads)
    return (*(next(left) if want else query.new_empty(0) for want in wants), query.new_empty(0))
