"""Peak memory of a call: `python -m benchmarks.peak_memory fused additive 32 1000 1000 512`.

It is what PyTorch's allocator gives: every tensor, and all scratch of the fused ops beyond 16 KB of stack, but not the
buffers of a BLAS library.
"""

from __future__ import annotations

import argparse

from torch.profiler import ProfilerActivity, profile

from benchmarks.implementations import EAGER, FUSED, Call, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import Timed

IMPLEMENTATIONS = {each.name: each for each in (FUSED, EAGER)}


def extra_bytes(call: Timed) -> int:
    """What the call holds at its peak beyond what it returns."""
    with call.active():
        call()  # whatever a first call sets up is there before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del results  # alive until here: what is still held is they
    return peak - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("method")
    parser.add_argument("sizes", type=int, nargs=4, metavar="B T S H")
    arguments = parser.parse_args()
    problem = Problem(arguments.method, Shape("", *arguments.sizes))
    print(extra_bytes(Call(IMPLEMENTATIONS[arguments.implementation], problem, "forward+backward")))


if __name__ == "__main__":
    main()
