"""AttentionMemory: what the decoder steps of one batch share, prepared once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attn_ext import checks, functional


class AttentionMemory:
    """The encoder outputs of one batch with everything that does not change from step to step.

    ::

        memory = attn.memory(encoder_outputs, lengths)       # once per batch
        for t in range(steps):
            context, weights = attn(hidden, memory)          # each decoder step

    Args:
        memory: [B, S, Dm] encoder outputs.
        method, weight, v, bias, lengths, mask, scale: as in :func:`attn_ext.luong_attention`.

    Raises:
        ValueError, TypeError: as :func:`attn_ext.luong_attention`.
    """

    def __init__(
        self,
        memory: Tensor,
        method: str = "dot",
        *,
        weight: Tensor | None = None,
        v: Tensor | None = None,
        bias: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        memory, weight, v, bias = functional.autocast(memory, weight, v, bias)
        arguments = checks.Arguments("AttentionMemory")
        functional.check_memory(arguments, memory, method, weight, v, bias)
        self.memory = memory
        self.method = method
        self.weight = weight
        self.v = v
        self.lengths = arguments.lengths(lengths)
        if mask is not None and isinstance(mask, Tensor) and mask.dim() == 3:
            arguments.bind("T", mask.shape[1], "mask")
        arguments.mask(mask)
        self.mask = mask
        self.scale = arguments.scale(scale)
        self.query_weight = functional.query_weight(memory, method, weight)
        self.keys = functional.project_keys(memory, method, weight, bias, self.lengths, mask)

    def attend(self, query: Tensor, *, need_weights: bool = True) -> tuple[Tensor, Tensor | None]:
        """:func:`attn_ext.luong_attention` of `query` [B, T, Dq] or [B, Dq] over this memory."""
        attended = functional.attend_unchecked(
            query,
            self.query_weight,
            self.keys,
            self.v,
            self.memory,
            self.lengths,
            self.mask,
            self.scale,
            need_weights,
        )
        if attended is not None:
            return attended
        (query,) = functional.autocast(query)
        arguments = checks.Arguments("AttentionMemory")
        functional.check_query(arguments, query)
        arguments.floating("the memory", self.memory, "B S Dq" if self.method == "dot" else "B S Dm")
        if self.method == "general":
            arguments.floating("weight", self.weight, "Dm Dq")
        elif self.method == "concat":
            arguments.bind("Dq+Dm", arguments.sizes["Dq"] + arguments.sizes["Dm"], "query and the memory")
            arguments.floating("weight", self.weight, "A Dq+Dm")
        arguments.mask(self.mask)
        arguments.flag("need_weights", need_weights)
        return functional.attend(
            functional.project_query(query, self.query_weight),
            self.keys,
            self.v,
            self.memory,
            lengths=self.lengths,
            mask=self.mask,
            scale=self.scale,
            need_weights=need_weights,
        )

    def refuse_second_opinion(self, method: str, **overrides: object) -> None:
        """A call that brings its own method or parameters to a memory that has them is a mistake: ValueError."""
        if method not in ("dot", self.method):
            raise ValueError(
                f"luong_attention: method is {method!r}, but memory is an AttentionMemory for {self.method!r}"
            )
        for name, value in overrides.items():
            if value is not None:
                raise ValueError(
                    f"luong_attention: memory is an AttentionMemory, which has its own {name}: {name} must be None here"
                )
