"""luong_attention, forward and with its backward pass, against its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from benchmarks import bounds, limits
from benchmarks.grid import why_skipped
from benchmarks.implementations import (
    AUTOTUNED,
    COMPILED,
    DIRECTIONS,
    EAGER,
    FUSED,
    METHODS,
    NO_WEIGHTS,
    REFERENCE,
    SDPA_BACKENDS,
    TUTORIAL,
    Call,
    Implementation,
    Problem,
)
from benchmarks.machine import last_level_cache
from benchmarks.shapes import GRID, GRID_COMPILED, SHAPES, Shape
from benchmarks.timing import check

# Each takes torch.compile seconds, all of the grid would take it hours.
COMPILED_AT = (*SHAPES, *GRID_COMPILED)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = (*SHAPES, *GRID) if metafunc.config.getoption("benchmark_full") else SHAPES
    metafunc.parametrize("method", METHODS)
    metafunc.parametrize("shape", shapes, ids=str)
    metafunc.parametrize("direction", DIRECTIONS)


def _peers(shape: Shape, full: bool) -> Iterator[Implementation]:
    yield EAGER
    yield TUTORIAL
    yield from SDPA_BACKENDS
    if shape in COMPILED_AT:
        yield COMPILED
        if full:
            yield AUTOTUNED


def test_op(
    method: str,
    shape: Shape,
    direction: str,
    measure: Callable[..., None],
    package_peers: tuple[Implementation, ...],
    absent: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    problem = Problem(method, shape)
    copies = 1 + 2 * last_level_cache() // shape.memory_bytes if shape.is_cold else 1
    fused = Call(FUSED, problem, direction, copies=copies)
    unweighted = Call(FUSED, problem, direction, need_weights=False, name=NO_WEIGHTS, copies=copies)
    rivals = {}
    peers = []
    for peer in (*_peers(shape, request.config.getoption("benchmark_full")), *package_peers):
        needs_weights = peer.accepts(method, need_weights=True)
        if not needs_weights and not peer.accepts(method, need_weights=False):
            continue
        if why := why_skipped(peer, method, shape, direction):
            absent[f"{peer.name} at {method} {shape.sizes} {direction}"] = why
            continue
        try:
            call = Call(peer, problem, direction, needs_weights, copies=copies)
        except RuntimeError as error:
            if not peer.is_compiled:
                raise
            absent[peer.name] = f"does not compile here ({type(error).__name__})"
            continue
        check(call, Call(REFERENCE, problem, direction, needs_weights))
        peers.append(call)
        rivals[peer.name] = FUSED.name if needs_weights else NO_WEIGHTS
    check(fused, Call(REFERENCE, problem, direction))
    if shape not in COMPILED_AT:
        absent[f"{COMPILED.name} in the grid"] = f"takes seconds to compile: races at {len(GRID_COMPILED)} shapes of it"
    if NO_WEIGHTS in rivals.values():
        check(unweighted, Call(REFERENCE, problem, direction, need_weights=False))
        peers.append(unweighted)
    try:
        parts = bounds.parts(method, shape, direction)
    except limits.NoCompilerError as error:
        parts = []
        absent["limits"] = str(error).splitlines()[0]
    measure("op", method, shape, direction, fused, peers, rivals, parts)
