"""A decoder that attends step by step, trained or run: what attention adds to a decoder without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_ext
from benchmarks.implementations import FUSED, REFERENCE
from benchmarks.shapes import Shape

VOCABULARY = 2000
ATTENTIONS = (FUSED.name, "none", "eager", REFERENCE.name)

# What a step calls: its hidden state [B, H] to its context [B, H].
Attend = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """What the decoder is besides its attention."""

    cell: str = "GRU"
    input_feeding: bool = False

    def __str__(self) -> str:
        return f"{self.cell}, feeding" if self.input_feeding else self.cell


GRU = Kind()


class Decoder(nn.Module):
    """A cell, its attention, h~ = tanh(Wc [h; c]) and the output layer, for hidden size H and `VOCABULARY` symbols."""

    def __init__(self, method: str, size: int, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(VOCABULARY, size)
        cell = {"GRU": nn.GRUCell, "LSTM": nn.LSTMCell}[kind.cell]
        self.cell = cell(2 * size if kind.input_feeding else size, size)
        self.attention = attn_ext.LuongAttention(method, size)
        self.Wc = nn.Linear(2 * size, size, bias=False)
        self.output = nn.Linear(size, VOCABULARY)

    def predict(
        self, targets: Tensor, memory: Tensor, prepare: Callable[[nn.Module, Tensor], Attend]
    ) -> Iterator[Tensor]:
        """The logits [B, V] of each of `targets` [B, T], from `memory` [B, S, H]; `prepare` sees the memory once."""
        attend = prepare(self.attention, memory)
        hidden = attentional = memory[:, -1]
        state = (hidden, hidden) if self.kind.cell == "LSTM" else hidden
        previous = torch.zeros_like(targets[:, 0])
        for target in targets.unbind(1):
            inputs = self.embedding(previous)
            state = self.cell(torch.cat([inputs, attentional], dim=-1) if self.kind.input_feeding else inputs, state)
            hidden = state[0] if self.kind.cell == "LSTM" else state
            attentional = torch.tanh(self.Wc(torch.cat([hidden, attend(hidden)], dim=-1)))
            yield self.output(attentional)
            previous = target


def _none(_attention: nn.Module, memory: Tensor) -> Attend:
    # The rest of the decoder is to be the same: Wc reads the encoder's last output at every step.
    last = memory[:, -1]
    return lambda _hidden: last


def _attn_ext(attention: nn.Module, memory: Tensor) -> Attend:
    prepared = attention.memory(memory)
    return lambda hidden: attention(hidden, prepared)[0]


def _eager(attention: nn.Module, memory: Tensor) -> Attend:
    """The best-written form: what does not depend on the step is taken once, before the loop."""
    if attention.method == "concat":
        query_weight, key_weight = attention.Wa.weight.chunk(2, dim=1)
        keys = F.linear(memory, key_weight)

    def attend(hidden: Tensor) -> Tensor:
        if attention.method == "concat":
            query = F.linear(hidden, query_weight)
            scores = torch.tanh(query.unsqueeze(1) + keys) @ attention.Va  # [B, S]
        else:
            query = hidden if attention.Wa is None else attention.Wa(hidden)
            scores = torch.bmm(memory, query.unsqueeze(2)).squeeze(2)
        return torch.bmm(torch.softmax(scores, dim=-1).unsqueeze(1), memory).squeeze(1)

    return attend


class DecoderLoop:
    """T steps over one memory, whose symbols are known.

    "forward+backward" is a training step: it returns the loss and the gradients of memory and all parameters. "forward"
    is inference and returns every step's logits [B, V].
    """

    def __init__(
        self,
        attention: str,
        method: str,
        shape: Shape,
        direction: str = "forward+backward",
        kind: Kind = GRU,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        B, T, S, H = shape.sizes
        self.name = attention
        self.active: Callable[[], AbstractContextManager[object]] = nullcontext
        if attention in (FUSED.name, REFERENCE.name):
            self.active = partial(attn_ext.use_backend, attention)
        self._trains = direction == "forward+backward"
        self._prepare = {"none": _none, "eager": _eager}.get(attention, _attn_ext)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._decoder = Decoder(method, H, kind).to(device, dtype)
            self._memory = torch.randn(B, S, H).mul_(H**-0.5).to(device, dtype).requires_grad_()
            self._targets = torch.randint(VOCABULARY, (B, T)).to(device)

    def __call__(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self._trains):
            predictions = self._decoder.predict(self._targets, self._memory, self._prepare)
            if not self._trains:
                return tuple(predictions)
            losses = [F.cross_entropy(each, target) for each, target in zip(predictions, self._targets.T, strict=True)]
            loss = torch.stack(losses).mean()
            return loss, *torch.autograd.grad(loss, list(self._leaves()), allow_unused=True)

    def _leaves(self) -> Iterator[Tensor]:
        yield self._memory
        yield from self._decoder.parameters()
