"""What bounds an op: the time that its parts take at the machine's own limits, one after the other.

A part is counted where every implementation has it: the call itself, memory's traffic where a single query reads it,
the products and the tanh terms where the queries are many. The softmax and whatever else a kernel does are left out, so
that no share is flattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import limits
from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Part:
    """So much of what a probe does."""

    probe: limits.Probe
    amount: float

    def seconds(self, of_probe: float) -> float:
        """What it takes where the probe takes `of_probe` seconds."""
        return self.amount / self.probe.amount * of_probe


def parts(method: str, shape: Shape, direction: str) -> list[Part]:
    """Of luong_attention, `direction` "forward" or "forward+backward".

    Raises:
        NoCompilerError: the probes need a compiler.
    """
    with_backward = direction == "forward+backward"
    passes = 3 if with_backward else 1  # of each product, which has two more for the gradients of its factors
    amounts = {"call with gradient" if with_backward else "call": 1.0}
    found = []
    if shape.T == 1:
        amounts["multiply-add"] = passes * projections(method, shape)
        found.append(_traffic("read", shape, shape.memory_bytes))
        if with_backward:  # it is read once more, and its gradient is written
            found.append(_traffic("copy", shape, 2 * shape.memory_bytes))
    else:
        amounts["multiply-add"] = passes * (projections(method, shape) + attention(method, shape))
    if method == "concat":
        amounts["additive forward"] = shape.elements
        if with_backward:
            amounts["additive backward"] = shape.elements
    return found + [Part(limits.probe(name), amount) for name, amount in amounts.items() if amount > 0]


def projections(method: str, shape: Shape) -> float:
    """FLOP of the forward pass's, of queries and keys: general's are of either."""
    rows = {"dot": 0, "general": shape.B * min(shape.T, shape.S), "concat": shape.B * (shape.T + shape.S)}[method]
    return 2.0 * rows * shape.H * shape.H


def attention(method: str, shape: Shape) -> float:
    """FLOP of the forward pass's products: dot products' scores, and contexts."""
    return (2.0 if method == "concat" else 4.0) * shape.elements


def _traffic(name: str, shape: Shape, amount: int) -> Part:
    return Part(limits.probe(name) if shape.is_cold else limits.probe_of_size(name, shape.memory_bytes), amount)


def largest(of: Sequence[Part], seconds: dict[str, float]) -> str:
    """The name of the part that takes the most of the bound."""
    return max(of, key=lambda part: part.seconds(seconds[part.probe.name])).probe.name
