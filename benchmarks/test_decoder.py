"""A decoder that attends at every step, trained ("forward+backward") and run ("forward"): what its attention costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from benchmarks.bounds import Part
from benchmarks.decoder import DecoderLoop
from benchmarks.implementations import DIRECTIONS, EAGER, FUSED, METHODS, REFERENCE
from benchmarks.limits import Probe
from benchmarks.shapes import DECODER
from benchmarks.timing import check


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_decoder(method: str, direction: str, measure: Callable[..., None]) -> None:
    fused, eager, reference, without = (
        DecoderLoop(name, method, DECODER, direction) for name in (FUSED.name, EAGER.name, REFERENCE.name, "none")
    )
    for loop in (fused, eager):
        check(loop, reference)
    bound = Part(Probe("the decoder without attention", 1, "steps", without), 1)
    rivals = {EAGER.name: FUSED.name}
    measure("decoder", method, DECODER, direction, fused, [eager], rivals, [bound], warm=False, slow=math.inf)
