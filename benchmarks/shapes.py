"""The shapes that are timed, named after the models that have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """T = 1 is a decoder that runs step by step, T > 1 one that knows its targets (teacher forcing)."""

    use: str
    B: int
    T: int
    S: int
    H: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.B, self.T, self.S, self.H

    def __str__(self) -> str:
        return f"{self.use}-{'x'.join(map(str, self.sizes))}"


SHAPES = (
    Shape("one sentence, a step", 1, 1, 24, 128),
    Shape("translation, a step", 64, 1, 24, 128),
    Shape("translation", 64, 24, 24, 128),
    Shape("translation, long", 32, 50, 50, 512),
    Shape("OCR", 32, 25, 64, 256),
    Shape("text-to-speech, a step", 32, 1, 150, 256),
    Shape("text-to-speech", 16, 100, 60, 128),
    Shape("speech, a step", 16, 1, 400, 512),
    Shape("speech", 4, 40, 400, 256),
    Shape("time series", 64, 24, 96, 64),
)
