"""The shapes that are timed, named after the models that have them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Shape:
    """T = 1 is a decoder that runs step by step, T > 1 one that knows its targets (teacher forcing).

    `is_cold`: to be measured with a memory that no cache holds, as where much else passes through it between two steps.
    """

    use: str
    B: int
    T: int
    S: int
    H: int
    is_cold: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.B, self.T, self.S, self.H

    @property
    def label(self) -> str:
        """The sizes, as the reports write them."""
        return f"({','.join(map(str, self.sizes))})"

    @property
    def memory_bytes(self) -> int:
        """Of the memory [B, S, H] in float32."""
        return 4 * self.B * self.S * self.H

    @property
    def elements(self) -> int:
        """B T S H: the multiply-adds of a product, the tanh of additive scores."""
        return self.B * self.T * self.S * self.H

    def __str__(self) -> str:
        return f"{self.use}-{'x'.join(map(str, self.sizes))}"


def unnamed(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    """Shapes by (B, T, S, H) alone."""
    return tuple(Shape("", *each) for each in sizes)


SHAPES = (
    Shape("one sentence, a step", 1, 1, 24, 128),
    Shape("translation, a step", 64, 1, 24, 128),
    Shape("translation", 64, 24, 24, 128),
    Shape("translation, long", 32, 50, 50, 512),
    Shape("OCR", 32, 25, 64, 256),
    Shape("text-to-speech, a step", 32, 1, 150, 256),
    Shape("text-to-speech", 16, 100, 60, 128),
    Shape("speech, a step", 16, 1, 400, 512, is_cold=True),
    Shape("speech", 4, 40, 400, 256),
    Shape("time series", 64, 24, 96, 64),
)

DECODER = Shape("translation, a decoder", 64, 30, 30, 256)

# The targets' shapes, as they number them.
ADDITIVE = unnamed((32, 24, 24, 128), (32, 50, 50, 512), (8, 256, 256, 512))
MANY_QUERIES = unnamed(
    (32, 50, 50, 512),
    (8, 256, 256, 512),
    (64, 32, 100, 64),
    (16, 128, 128, 256),
    (4, 256, 1000, 1024),
    (8, 50, 1000, 128),
)
LARGE_MEMORY = unnamed((64, 1, 512, 1024), (64, 1, 1000, 512), (256, 1, 200, 512))
TRAINING_STEPS = unnamed((64, 30, 30, 256), (64, 50, 50, 512), (16, 50, 400, 512))
RESIDENT_SIZE = Shape("", 16, 20, 100, 128)
HALVES = unnamed((64, 1, 50, 512), (64, 1, 512, 1024), (32, 50, 50, 512), (8, 256, 256, 512))

# Target 5: every shape that anybody might have, the awkward sizes among them. Small ones first.
GRID = tuple(
    sorted(
        unnamed(*product((1, 8, 64, 256), (1, 24, 50, 256), (1, 7, 24, 200, 1000), (64, 128, 500, 512, 1024))),
        key=lambda shape: shape.elements,
    )
)
GRID_SAMPLE = unnamed(
    (1, 1, 24, 128), (256, 24, 1, 64), (8, 24, 7, 500), (64, 1, 200, 512),
    (1, 256, 1000, 64), (64, 50, 24, 512), (256, 1, 1000, 512),
)  # fmt: skip
GRID_COMPILED = unnamed(
    (1, 1, 24, 128), (8, 24, 7, 500), (64, 1, 200, 512), (64, 50, 24, 512), (8, 50, 200, 512), (1, 256, 1000, 1024),
)  # fmt: skip
