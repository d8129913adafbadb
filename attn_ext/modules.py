"""LuongAttention, and the classic tutorial interface on top of it."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from attn_ext import checks, functional
from attn_ext.memory import AttentionMemory


class LuongAttention(nn.Module):
    """:func:`luong_attention` (Luong, Pham and Manning 2015, arXiv 1508.04025) with its parameters.

    Args:
        method: "dot", "general" or "concat".
        hidden_size: Dq, the size of the decoder's hidden state.
        memory_size: Dm, the size of the encoder outputs; None is `hidden_size`, and dot needs them equal.
        attention_size: A, concat only; None is `hidden_size`.
        bias: concat only, adds a bias inside the tanh.
        scale: multiplies the scores; None is 1.
        device, dtype: of the parameters.

    Attributes:
        Wa: nn.Linear(Dq, Dm) for general, nn.Linear(Dq + Dm, A) for concat; None for dot. It is read and never called:
            its hooks, those of nn.utils.prune and nn.utils.weight_norm too, do not run. nn.utils.parametrizations do.
        Va: [A] for concat; None otherwise.

    Raises:
        ValueError: an unknown method or device; sizes that are not positive; a size or bias that the method has not.
        TypeError: a size that is no integer, a bias that is no bool, a dtype that is not of these four, no device.
    """

    Wa: nn.Linear | None
    Va: nn.Parameter | None

    def __init__(
        self,
        method: str,
        hidden_size: int,
        memory_size: int | None = None,
        attention_size: int | None = None,
        *,
        bias: bool = False,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        checks.choice(caller, "method", method, functional.METHODS)
        memory_size = hidden_size if memory_size is None else memory_size
        hidden_size, memory_size = checks.positive(caller, hidden_size=hidden_size, memory_size=memory_size)
        checks.flag(caller, "bias", bias)
        checks.device(caller, "device", device)
        if dtype is not None and dtype not in checks.DTYPES:
            needed = ", ".join(map(str, checks.DTYPES))
            raise TypeError(f"{caller}: dtype is {dtype}, needed is one of {needed}, or None")
        if method == "dot" and memory_size != hidden_size:
            raise ValueError(
                f"{caller}: method='dot' needs memory_size equal to hidden_size={hidden_size}, got {memory_size}; "
                "'general' and 'concat' take any"
            )
        if method != "concat" and attention_size is not None:
            raise ValueError(f"{caller}: attention_size is for method='concat', got {attention_size} for {method!r}")
        if method != "concat" and bias:
            raise ValueError(f"{caller}: bias is for method='concat', got bias=True for {method!r}")
        self.method = method
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.attention_size: int | None = None
        self.scale = checks.Arguments(caller).scale(scale)
        self._identity = object()  # not this module's copies'
        self.Wa, va = None, None
        if method == "general":
            self.Wa = NonDynamicallyQuantizableLinear(hidden_size, memory_size, bias=False, device=device, dtype=dtype)
        elif method == "concat":
            attention_size = hidden_size if attention_size is None else attention_size
            (attention_size,) = checks.positive(caller, attention_size=attention_size)
            self.attention_size = attention_size
            size = hidden_size + memory_size
            self.Wa = NonDynamicallyQuantizableLinear(size, attention_size, bias=bias, device=device, dtype=dtype)
            va = nn.Parameter(torch.empty(attention_size, device=device, dtype=dtype))
        self.register_parameter("Va", va)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's own initialisation, for Va too: uniform in +-1/sqrt(A)."""
        if self.Wa is not None:
            self.Wa.reset_parameters()
        if self.Va is not None:
            bound = 1 / math.sqrt(self.Va.shape[0])
            nn.init.uniform_(self.Va, -bound, bound)

    def forward(
        self,
        hidden: Tensor,
        encoder_outputs: Tensor | AttentionMemory,
        lengths: Tensor | Collection[int] | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            hidden: [B, T, Dq], or [B, Dq] for one decoder step.
            encoder_outputs: [B, S, Dm], or what :meth:`memory` made of it.
            lengths: [B] integers, 0 <= length <= S; with a memory, lengths and mask are its own.
            mask: [B, S] or [B, T, S] bool, True = may be attended.
            need_weights: False returns None for the weights.

        Returns:
            context [B, T, Dm] (or [B, Dm]); weights [B, T, S] (or [B, S]), or None.

        Raises:
            ValueError, TypeError: as :func:`luong_attention`.
        """
        is_memory = isinstance(encoder_outputs, AttentionMemory)
        try:
            # Sizes that fit each other, or in sum the weight, need not be this module's; if one is, the other is.
            fits = hidden.size(-1) == self.hidden_size
            if fits and not is_memory:
                return functional.luong_attention(
                    hidden,
                    encoder_outputs,
                    self.method,
                    **self._parameters_of_method(),
                    lengths=lengths,
                    mask=mask,
                    scale=self.scale,
                    need_weights=need_weights,
                )
        except functional.REFUSALS:
            # In the names of this call, if the sizes are what is wrong.
            self._check_sizes(encoder_outputs.memory if is_memory else encoder_outputs, hidden)
            raise
        if not fits:
            self._check_sizes(encoder_outputs.memory if is_memory else encoder_outputs, hidden)
        is_for_this = encoder_outputs.method == self.method and encoder_outputs._is_for(self._identity)
        if not is_for_this or lengths is not None or mask is not None:
            self._check_memory(type(self).__name__, encoder_outputs, lengths=lengths, mask=mask)
        return encoder_outputs._attend_for(type(self).__name__, "hidden", hidden, need_weights)

    def memory(
        self, encoder_outputs: Tensor, lengths: Tensor | Collection[int] | None = None, mask: Tensor | None = None
    ) -> AttentionMemory:
        """What every decoder step of a batch shares, prepared once: pass it in place of `encoder_outputs`.

        It belongs to this module, and to this forward pass: after an optimizer step, make a new one.
        """
        self._check_sizes(encoder_outputs)
        memory = AttentionMemory(
            encoder_outputs,
            self.method,
            **self._parameters_of_method(),
            lengths=lengths,
            mask=mask,
            scale=self.scale,
        )
        return memory._made_by(self._identity)

    def _check_memory(self, caller: str, encoder_outputs: AttentionMemory, **overrides: object) -> None:
        """That it is of this module, and comes without what it has itself."""
        checks.choice(caller, "encoder_outputs.method", encoder_outputs.method, [self.method])
        encoder_outputs._check_maker(caller, "encoder_outputs", self._identity)
        encoder_outputs._refuse_second_opinion(caller, "encoder_outputs", self.method, **overrides)

    def _check_sizes(self, encoder_outputs: Tensor, *hidden: Tensor) -> None:
        arguments = checks.Arguments(type(self).__name__)
        if self.Wa is not None:
            arguments.leader = ("Wa.weight", self.Wa.weight)
        arguments.bind("Dq", self.hidden_size, "hidden_size")
        arguments.bind("Dm", self.memory_size, "memory_size")
        for each in hidden:
            functional.check_query(arguments, each, name="hidden")
        arguments.floating("encoder_outputs", encoder_outputs, "B S Dm")

    def _parameters_of_method(self) -> dict[str, Tensor | None]:
        # Each look at a module or a parameter takes as long as a dozen other steps of a small call.
        projection = self.Wa
        if projection is None:
            return {}
        if self.method == "general":
            return {"weight": projection.weight}
        return {"weight": projection.weight, "v": self.Va, "bias": projection.bias}

    def extra_repr(self) -> str:
        sizes = f"{self.method!r}, hidden_size={self.hidden_size}, memory_size={self.memory_size}"
        if self.attention_size is not None:
            sizes += f", attention_size={self.attention_size}"
        return sizes if self.scale == 1 else f"{sizes}, scale={self.scale:g}"


class Attention(LuongAttention):
    """The classic tutorial interface: weights only, for one decoder step.

    ::

        attn = attn_ext.Attention("concat", batch_size, hidden_size)
        weights = attn(hidden, encoder_outputs)      # [1, B, H], [B, S, H] -> [B, 1, S]

    Va is [hidden_size] and shared by the batch; the form that circulates gives every batch element its own.

    Args:
        method: "dot", "general" or "concat".
        batch_size: accepted as the tutorials pass it; any batch may be given to the module.
        hidden_size: H, of the decoder state and the encoder outputs alike.
    """

    def __init__(self, method: str, batch_size: int, hidden_size: int) -> None:
        checks.positive(type(self).__name__, batch_size=batch_size)
        super().__init__(method, hidden_size)

    def forward(self, hidden: Tensor, encoder_outputs: Tensor) -> Tensor:  # type: ignore[override]
        """hidden [1, B, H], encoder_outputs [B, S, H] -> weights [B, 1, S].

        Raises:
            ValueError, TypeError: as :func:`luong_attention`.
        """
        arguments = checks.Arguments("Attention")
        arguments.bind("layers", 1, "the interface")
        arguments.bind("H", self.hidden_size, "hidden_size")
        arguments.floating("hidden", hidden, "layers B H")
        arguments.floating("encoder_outputs", encoder_outputs, "B S H")
        _, weights = super().forward(hidden.transpose(0, 1), encoder_outputs)
        assert weights is not None
        return weights
