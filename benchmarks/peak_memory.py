"""Peak memory of a call, in its own process: `python -m benchmarks.peak_memory fused additive 32 1000 1000 512`."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

from benchmarks.implementations import EAGER, FUSED, Call, Problem
from benchmarks.machine import in_a_process
from benchmarks.shapes import Shape

IMPLEMENTATIONS = {each.name: each for each in (FUSED, EAGER)}


def extra_bytes(implementation: str, method: str, shape: Shape) -> int:
    """What forward and backward take at their peak beyond inputs, outputs and gradients."""
    return in_a_process("benchmarks.peak_memory", implementation, method, *shape.sizes)["extra_bytes"]


def measure(implementation: str, method: str, shape: Shape) -> int:
    """:func:`extra_bytes` of this process, which has not held anything large yet."""
    # Whatever a first call sets up, threads and their stacks among it, is there before.
    Call(IMPLEMENTATIONS[implementation], Problem(method, Shape("", 2, 2, 2, 16)), "forward+backward")()
    before = _peak()
    problem = Problem(method, shape)
    call = Call(IMPLEMENTATIONS[implementation], problem, "forward+backward")
    with call.active():
        results = call()
    kept = (*problem.inputs.values(), problem.grad_context, *results)
    # A small call fits into what starting up has left free.
    return max(0, _peak() - before - sum(tensor.nbytes for tensor in kept if tensor is not None))


def _peak() -> int:
    """Bytes. Not the ru_maxrss of Linux: a new process begins with that of the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("method")
    parser.add_argument("sizes", type=int, nargs=4, metavar="B T S H")
    arguments = parser.parse_args()
    extra = measure(arguments.implementation, arguments.method, Shape("", *arguments.sizes))
    print(json.dumps({"extra_bytes": extra}))


if __name__ == "__main__":
    main()
