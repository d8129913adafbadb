"""The specification in plain PyTorch, and the fallback where no kernel is compiled.

A query [B, D] is one decoder step: no result has the T then. Halves are computed in float32 and rounded once, at the
end. Everything here is differentiable to any order by autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    memory: Tensor,
    keys: Tensor | None = None,
    v: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """weights = softmax(scores) over the allowed steps, 0 elsewhere; context = sum_s weights_s m_s (Luong 2015, eq. 7).

    The scores, without a v, are scale * q . k, where the memory is its own keys if there are no others (Luong 2015,
    eq. 8, dot); with one, scale * v . tanh(q + k) (Bahdanau 2014, A.1.2; Luong 2015, eq. 8, concat).
    """
    allowed = allowed_positions(memory, lengths, mask)
    q = _steps(query)
    m = _without_unattended_rows(memory.to(q.dtype), allowed)
    k = m if keys is None else _without_unattended_rows(keys.to(q.dtype), allowed)
    if v is None:
        scores = torch.matmul(q, k.transpose(1, 2)) * scale  # [B, T, S]
    else:
        hidden = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1))  # [B, T, S, A]
        scores = torch.matmul(hidden, v.to(q.dtype)) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    # With nothing to attend, softmax(-inf, ...) would be NaN: any finite scores do there, their weights are zeroed.
    unattended = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(unattended, 0.0), dim=-1)
    weights = weights.masked_fill(unattended if allowed is None else unattended | ~allowed, 0.0)
    context = torch.matmul(weights, m)  # [B, T, Dm]
    if query.dim() == 2:
        context, weights = context.squeeze(1), weights.squeeze(1)
    return context.to(query.dtype), weights.to(query.dtype) if need_weights else None


def projected_attention(
    query: Tensor,
    weight: Tensor,
    memory: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """General, without a v: score = scale * (weight q) . m; concat: score = scale * v . tanh(weight [q; m] + bias)."""
    keys = None
    if v is not None:
        weight, key_weight = split_weight(weight, memory)
        keys = project_keys(memory, key_weight, bias, lengths, mask)
    query = F.linear(query, weight)
    return attention(query, memory, keys, v, lengths=lengths, mask=mask, scale=scale, need_weights=need_weights)


def split_weight(weight: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """[Wq Wm] = weight: concat's, for queries and for the memory."""
    size = memory.shape[-1]
    return weight.split([weight.shape[1] - size, size], dim=1)


def project_keys(
    memory: Tensor, key_weight: Tensor, bias: Tensor | None, lengths: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Wm m + bias. NaN in a row that no query may attend would reach the gradient of Wm, as 0 * NaN."""
    return F.linear(_without_unattended_rows(memory, allowed_positions(memory, lengths, mask)), key_weight, bias)


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


def _without_unattended_rows(rows: Tensor, allowed: Tensor | None) -> Tensor:
    """`rows` [B, S, D] with the steps that no query may attend set to 0: what stands there (NaN, say) goes nowhere."""
    if allowed is None:
        return rows
    return rows.masked_fill(~allowed.any(dim=1).unsqueeze(-1), 0.0)


def _steps(query: Tensor) -> Tensor:
    """`query` as [B, T, D], in the type that products are accumulated in."""
    query = query if query.dim() == 3 else query.unsqueeze(1)
    return query.float() if query.dtype in (torch.bfloat16, torch.float16) else query
