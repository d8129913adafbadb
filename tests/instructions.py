"""Instructions that the CPU kernels take, counted by an emulator: the same number on a busy machine as on an idle one.

What waits, for memory or for another result, is not seen, and is what the benchmarks are for: the panels that make
large products fast are 2.5 % more instructions.

`python -m tests.instructions` counts them and records them in tests/instructions.json, by compiler and instruction
set; tests/test_instructions.py holds every later count against that. Record a change that is meant, and commit the
file with it: its diff says which calls got cheaper or dearer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compilers import (
    AARCH64,
    KERNELS,
    KERNELS_FLAGS,
    SHIPPED,
    NotBuiltError,
    compile_program,
    of_capability,
    shipped_kernels,
)

RECORD = Path(__file__).with_suffix(".json")
HOW_TO_RECORD = "to record the counts as they are now: python -m tests.instructions"

CAPABILITIES = ("default", "avx2", "aarch64")  # valgrind knows no AVX-512; QEMU counts the last

COUNT = "tests/kernels/count.cpp"
PLUGIN = ("tests/kernels/count_plugin.cpp",)

# Shares of the recorded count. Runs differ by a few in a million. Kernels that an edit did not mean, inlined another
# way, differ by up to 1.8 %, and so does what a distribution's gcc makes that hardens by default. A second exponential
# for each score is 2.6 to 5.6 % of a dot product's forward. Of a speed-up beyond the second share, no loss would be
# seen until it is recorded.
MOST, LEAST = 1.03, 0.90

Counts = dict[str, int]


class NotCountableError(RuntimeError):
    """Instructions cannot be counted here; the message says why."""


def count(capability: str) -> tuple[str, Counts]:
    """The compiler's name with its major version, and the instructions of each call in tests/kernels/count.cpp.

    Raises:
        NotCountableError: there is no compiler, no emulator, or another kind of processor.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines, counts = (_by_qemu if capability == "aarch64" else _by_valgrind)(capability, Path(folder, "counts"))
    compiled_by, *names = lines
    return compiled_by, dict(zip(names, counts, strict=True))


def _by_valgrind(capability: str, out: Path) -> tuple[list[str], list[int]]:
    compiler, valgrind = os.environ.get("CXX") or shutil.which("g++"), shutil.which("valgrind")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise NotCountableError("these instructions are counted on x86-64 alone")
    if compiler is None or valgrind is None:
        raise NotCountableError("there is no C++ compiler or no valgrind here (Debian: g++, valgrind)")
    # Without it, the C library's exponentials are others too.
    if "avx2" not in Path("/proc/cpuinfo").read_text().split():
        raise NotCountableError("instructions are counted on processors with AVX2 alone")
    flags = (*KERNELS_FLAGS, *of_capability(capability), *SHIPPED)
    try:
        kernels = shipped_kernels(capability)
    except NotBuiltError as error:
        raise NotCountableError(str(error)) from error
    # Finding a function when it is first called is not counted.
    program = compile_program(f"count-{capability}", compiler, (COUNT,), flags, ("-Wl,-z,now",), compiled=kernels)
    lines = _run(
        *(valgrind, "--tool=callgrind", f"--callgrind-out-file={out}", "--combine-dumps=yes"),
        *("--toggle-collect=counted", "--dump-after=counted", str(program)),
    )
    totals = [int(total) for total in re.findall(r"^totals: (\d+)", out.read_text(), re.MULTILINE)]
    return lines, totals[:-1]  # the last is of what came after the calls


def _by_qemu(capability: str, out: Path) -> tuple[list[str], list[int]]:
    cross, native, qemu = map(shutil.which, ("aarch64-linux-gnu-g++", "g++", "qemu-aarch64"))
    if cross is None or native is None or qemu is None:
        raise NotCountableError(
            "there is no aarch64-linux-gnu-g++, no g++ or no qemu-aarch64 here "
            "(Debian: g++-aarch64-linux-gnu, g++, qemu-user)"
        )
    flags = (*KERNELS_FLAGS, *AARCH64, *SHIPPED)
    program = compile_program(f"count-{capability}", cross, (*KERNELS, COUNT), flags, ("-static",))
    plugin = compile_program("count-plugin", native, PLUGIN, ("-std=c++20", "-O2", "-fPIC", "-Wall"), ("-shared",))
    try:
        lines = _run(qemu, "-plugin", f"{plugin},out={out}", str(program))
    except RuntimeError as error:
        if out.exists():  # the plugin's first deed
            raise
        raise NotCountableError(f"this QEMU does not take the plugin that counts: {error}") from error
    return lines, [int(line) for line in out.read_text().split()]


def _run(*command: str) -> list[str]:
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if process.returncode != 0:
        raise RuntimeError(process.stderr[-4000:])
    return process.stdout.splitlines()


def complaints(counted: Counts, recorded: Counts) -> list[str]:
    """What is wrong with the counts, a line for each call."""
    found = []
    for name in sorted(counted.keys() | recorded.keys()):
        if name not in recorded:
            found.append(f"{name}: not recorded")
        elif name not in counted:
            found.append(f"{name}: recorded, but not counted")
        elif not LEAST <= (ratio := counted[name] / recorded[name]) <= MOST:
            remark = "" if ratio > 1 else ": record it, or nothing will notice when it is lost"
            found.append(f"{name}: {counted[name]} instructions, {recorded[name]} recorded, {ratio:.3f}x{remark}")
    return found


def read_record() -> dict[str, dict[str, Counts]]:
    """Counts by compiler and instruction set."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main() -> None:
    record = read_record()
    for capability in CAPABILITIES:
        try:
            compiler, counts = count(capability)
        except NotCountableError as error:
            print(f"{capability}: {error}", file=sys.stderr)
            continue
        of_compiler = record.setdefault(compiler, {})
        before = of_compiler.get(capability, {})
        of_compiler[capability] = counts
        for name, instructions in counts.items():
            change = f"  {instructions / before[name]:.3f}x" if name in before else ""
            print(f"{compiler}, {capability}: {name}  {instructions}{change}")
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
