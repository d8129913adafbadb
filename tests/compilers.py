"""Programs compiled for a test, kept under build/ until one of their sources, the compiler or a flag changes."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import include_paths

from benchmarks.limits import FLAGS_OF_AARCH64, FLAGS_OF_CAPABILITY
from tests.processes import PACKAGE

ROOT = PACKAGE.parent
BUILD = ROOT / "build" / "tests"

# The CPU kernels by themselves.
KERNELS = ("csrc/cpu/kernels/dot.cpp", "csrc/cpu/kernels/additive.cpp")
KERNELS_FLAGS = ("-std=c++20", "-w", "-pthread", *(f"-isystem{path}" for path in include_paths("cpu")))


def of_capability(name: str) -> tuple[str, ...]:
    """The flags that compile the kernels for an instruction set."""
    return (f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}", *FLAGS_OF_CAPABILITY[name])


# What setup.py compiles with on ARM's 64-bit processors.
AARCH64 = (*of_capability("default"), *FLAGS_OF_AARCH64)


def compile_program(
    name: str,
    compiler: str,
    sources: Sequence[str],
    flags: Sequence[str],
    link: Sequence[str],
    own_flags: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """The program made of `sources`, paths from the project's root; fails with the compiler's own words.

    `own_flags` are those that one source has besides `flags`.
    """
    own_flags = own_flags or {}
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    # A kernel's headers are many: whatever changes in csrc/ may be one of them.
    headers = [*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("tests/*/*.h")]
    contents = [path.read_text() for path in sorted(headers)]
    contents += [(ROOT / source).read_text() for source in sources]
    key = hashlib.sha256("\n".join((version, *flags, *link, repr(own_flags), *contents)).encode()).hexdigest()[:16]
    folder = BUILD / f"{name}-{key}"
    program = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # another worker of this test run may want it too
        if not program.exists():
            objects = [folder / f"{Path(source).stem}.o" for source in sources]

            def compile_one(source: str, to: Path) -> None:
                _run(compiler, *flags, *own_flags.get(source, ()), "-c", str(ROOT / source), "-o", str(to))

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(compile_one, sources, objects))
            unfinished = folder / "unfinished"
            _run(compiler, *flags, *map(str, objects), *link, "-o", str(unfinished))
            unfinished.replace(program)
    return program


def _run(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, " ".join(command) + "\n" + process.stderr[-4000:]
