"""A peer: additive scores in Triton, one tanh.approx for each query, step and feature."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def _configurations() -> list[triton.Config]:
    tiles = ((16, 16, 16), (16, 32, 16), (32, 32, 8), (32, 16, 16), (8, 64, 16), (1, 64, 64))
    return [
        triton.Config({"TILE_T": t, "TILE_S": s, "TILE_A": a}, num_warps=warps) for t, s, a in tiles for warps in (4, 8)
    ]


@triton.autotune(_configurations(), key=["T", "S", "A"])
@triton.jit
def _scores(
    query, keys, v, scores, T, S, A, TILE_T: tl.constexpr, TILE_S: tl.constexpr, TILE_A: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    s = tl.program_id(0) * TILE_S + tl.arange(0, TILE_S)
    total = tl.zeros((TILE_T, TILE_S), tl.float32)
    for first in range(0, A, TILE_A):
        a = first + tl.arange(0, TILE_A)
        inside = a[None, :] < A
        q = tl.load(query + batch * T * A + t[:, None] * A + a[None, :], mask=(t[:, None] < T) & inside, other=0.0)
        k = tl.load(keys + batch * S * A + s[:, None] * A + a[None, :], mask=(s[:, None] < S) & inside, other=0.0)
        factor = tl.load(v + a, mask=a < A, other=0.0).to(tl.float32)
        x = q.to(tl.float32)[:, None, :] + k.to(tl.float32)[None, :, :]
        hidden = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        total += tl.sum(hidden * factor[None, None, :], axis=2)
    at = scores + batch * T * S + t[:, None] * S + s[None, :]
    tl.store(at, total, mask=(t[:, None] < T) & (s[None, :] < S))


def additive_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """[B, T, S] float32 from contiguous query [B, T, A], keys [B, S, A] and v [A]."""
    (B, T, A), S = query.shape, keys.shape[1]
    scores = torch.empty(B, T, S, dtype=torch.float32, device=query.device)

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(S, tile["TILE_S"]), triton.cdiv(T, tile["TILE_T"]), B

    _scores[grid](query, keys, v, scores, T, S, A)
    return scores
