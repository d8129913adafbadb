"""The specification in plain PyTorch, and the fallback where no kernel is compiled.

Halves are computed in float32 and rounded once, at the end. Everything here is differentiable to any order by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dot_attention(
    query: Tensor,
    memory: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """score = scale * q . m  (Luong 2015, eq. 8, dot), then :func:`_attend`."""
    allowed = allowed_positions(memory, lengths, mask)
    q = query.to(_accumulation_dtype(query))
    m = _without_unattended_rows(memory.to(q.dtype), allowed)
    scores = torch.matmul(q, m.transpose(1, 2)) * scale  # [B, T, S]
    return _attend(scores, m, allowed, query.dtype, need_weights)


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
    """score = scale * v . tanh(q + k)  (Bahdanau 2014, A.1.2; Luong 2015, eq. 8, concat), then :func:`_attend`."""
    allowed = allowed_positions(values, lengths, mask)
    q = query.to(_accumulation_dtype(query))
    k = _without_unattended_rows(keys.to(q.dtype), allowed)
    m = _without_unattended_rows(values.to(q.dtype), allowed)
    hidden = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1))  # [B, T, S, A]
    scores = torch.matmul(hidden, v.to(q.dtype)) * scale  # [B, T, S]
    return _attend(scores, m, allowed, query.dtype, need_weights)


def allowed_positions(memory: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What `lengths` [B] and `mask` [B, S] or [B, T, S] leave to attend: [B, 1 or T, S] bool, None for everything."""
    allowed = None
    if lengths is not None:
        steps = torch.arange(memory.shape[1], device=memory.device)
        allowed = (steps < lengths.unsqueeze(1)).unsqueeze(1)
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask.unsqueeze(1)
        allowed = mask if allowed is None else allowed & mask
    return allowed


def _attend(
    scores: Tensor, values: Tensor, allowed: Tensor | None, dtype: torch.dtype, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """weights = softmax over the allowed steps, 0 elsewhere;  context = sum_s weights_s values_s  (Luong, eq. 7)."""
    if allowed is not None:
        # With nothing to attend, softmax(-inf, ...) would be NaN: any finite scores do there, their weights are zeroed.
        attends = allowed.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~attends, 0.0)
    weights = torch.softmax(scores, dim=-1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    context = torch.matmul(weights, values)  # [B, T, Dm]
    return context.to(dtype), weights.to(dtype) if need_weights else None


def _without_unattended_rows(rows: Tensor, allowed: Tensor | None) -> Tensor:
    """`rows` [B, S, D] with the steps that no query may attend set to 0: what stands there (NaN, say) goes nowhere."""
    if allowed is None:
        return rows
    return rows.masked_fill(~allowed.any(dim=1).unsqueeze(-1), 0.0)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
