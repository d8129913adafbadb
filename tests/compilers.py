"""Programs compiled for a test, kept under build/ until one of their sources, the compiler or a flag changes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

from benchmarks.limits import FLAGS_OF_AARCH64, FLAGS_OF_CAPABILITY
from tests.processes import PACKAGE

ROOT = PACKAGE.parent
BUILD = ROOT / "build" / "tests"


class NotBuiltError(RuntimeError):
    """setup.py has not compiled here what a program is to be made of."""


# The CPU kernels by themselves.
KERNELS = ("csrc/cpu/kernels/dot.cpp", "csrc/cpu/kernels/additive.cpp")
KERNELS_FLAGS = ("-std=c++20", "-w", "-pthread", *(f"-isystem{path}" for path in include_paths("cpu")))


def of_capability(name: str) -> tuple[str, ...]:
    """The flags that compile the kernels for an instruction set."""
    return (f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}", *FLAGS_OF_CAPABILITY[name])


# What setup.py compiles with on ARM's 64-bit processors.
AARCH64 = (*of_capability("default"), *FLAGS_OF_AARCH64)
# setup.py's and Python's own optimization: the code is what ships.
SHIPPED = ("-O3", "-fPIC", "-fwrapv", "-DNDEBUG")


def compile_program(
    name: str,
    compiler: str,
    sources: Sequence[str],
    flags: Sequence[str],
    link: Sequence[str],
    own_flags: Mapping[str, Sequence[str]] | None = None,
    compiled: Sequence[Path] = (),
) -> Path:
    """The program made of `sources`, paths from the project's root; fails with the compiler's own words.

    `own_flags` are those that one source has besides `flags`. Programs share the objects that are the same; those in
    `compiled` are there already.
    """
    own_flags = own_flags or {}
    # A kernel's headers are many: whatever changes in csrc/ may be one of them.
    headers = [path.read_text() for path in sorted([*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("tests/*/*.h")])]

    def compile_one(source: str) -> Path:
        path = ROOT / source
        command = (compiler, *flags, *own_flags.get(source, ()), "-c", str(path))
        return _made(f"{path.stem}.o", command, (path.read_text(), *headers))

    with ThreadPoolExecutor(2) as pool:
        objects = [*pool.map(compile_one, sources), *compiled]
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in compiled]
    return _made(name, (compiler, *flags, *map(str, objects), *link), contents)


def shipped_kernels(capability: str) -> list[Path]:
    """The CPU kernels' objects for an instruction set, as setup.py has compiled them for this PyTorch.

    Raises:
        NotBuiltError: one is missing.
    """
    objects = []
    for source in KERNELS:
        folder = f"build/*-{sys.implementation.cache_tag}-torch-{torch.__version__}/attn_ext._C/{capability.upper()}"
        found = list(ROOT.glob(f"{folder}/{Path(source).stem}/{Path(source).with_suffix('.o')}"))
        if not found:
            raise NotBuiltError(f"setup.py has compiled no {source} for {capability} here (make build)")
        objects += found
    return objects


def _made(name: str, command: Sequence[str], contents: Sequence[str] = ()) -> Path:
    """The file that the command makes of such contents, once."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join((version, *command, *contents)).encode()).hexdigest()[:16]
    folder = BUILD / key
    to = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # another worker of this test run may want it too
        if not to.exists():
            unfinished = folder / "unfinished"
            process = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            assert process.returncode == 0, " ".join(command) + "\n" + process.stderr[-4000:]
            unfinished.replace(to)
    return to
