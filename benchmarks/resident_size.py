"""Resident size over training steps, in a process of its own:
`python -m benchmarks.resident_size fused dot 16 20 100 128`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.decoder import ATTENTIONS, DecoderLoop
from benchmarks.machine import in_a_process
from benchmarks.shapes import Shape

STEPS = 1000
EVERY = 20  # steps between two looks


def curve(attention: str, method: str, shape: Shape) -> list[int]:
    """Bytes after every `EVERY` of `STEPS` training steps; empty where the system does not tell."""
    return in_a_process("benchmarks.resident_size", attention, method, *shape.sizes)


def measure(attention: str, method: str, shape: Shape) -> list[int]:
    """:func:`curve` of this process."""
    step = DecoderLoop(attention, method, shape)
    sizes = []
    with step.active():
        for i in range(1, STEPS + 1):
            step()
            if i % EVERY == 0:
                sizes.extend(_resident())
    return sizes


def _resident() -> list[int]:
    statm = Path("/proc/self/statm")
    return [int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")] if statm.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attention", choices=ATTENTIONS)
    parser.add_argument("method")
    parser.add_argument("sizes", type=int, nargs=4, metavar="B T S H")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.attention, arguments.method, Shape("", *arguments.sizes))))


if __name__ == "__main__":
    main()
