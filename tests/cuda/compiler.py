"""The CUDA kernels compiled for the host, kept under build/ until what the preprocessor makes of a source changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "tests" / "cuda"
LIBRARIES = Path(torch.__file__).with_name("lib")

FLAGS = ("-std=c++20", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-Itests/cuda", "-Icsrc/cuda")
# The hooks of ThreadSanitizer are the shim's own (tests/cuda/shim.h): its runtime is not linked.
KERNEL_FLAGS = (*FLAGS, "-Wno-unknown-pragmas", "-fsanitize=thread", "-x", "c++")
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
TORCH_FLAGS = (*FLAGS, *(f"-isystem{path}" for path in include_paths("cpu")))


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def compile_object(source: str, flags: Sequence[str]) -> Path:
    """The object of `source`, a path from the project's root."""
    name = Path(source).stem
    # -g names the lines of what is preprocessed: it is part of what makes the object.
    preprocessed = _run(*flags, "-E", source)
    key = hashlib.sha256("\n".join((_version(), *flags, preprocessed)).encode()).hexdigest()[:16]
    to = BUILD / f"{name}-{key}.o"
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        unfinished = to.with_suffix(f".{os.getpid()}")
        _run(*flags, "-c", source, "-o", str(unfinished))
        unfinished.replace(to)
    return to


def host_library(undefined: bool = False) -> Path:
    """The library that puts the CUDA kernels behind the ops of CPU tensors (tests/cuda/host.cpp).

    `undefined`: with UndefinedBehaviorSanitizer in the kernels, which ends the process at what it finds.
    """
    kernel_flags = (*KERNEL_FLAGS, *(UNDEFINED if undefined else ()))
    kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu") if path.stem != "build")
    sources = [(source, kernel_flags) for source in kernels]
    sources += [("tests/cuda/shim.cpp", FLAGS)]
    hosts = ("csrc/cuda/attention.cpp", "csrc/cuda/splits.cpp", "tests/cuda/host.cpp")
    sources += [(source, TORCH_FLAGS) for source in hosts]
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):  # another worker of this test run may want them too
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
            objects = list(pool.map(lambda pair: compile_object(*pair), sources))
        return _link(objects, undefined)


def _link(objects: Sequence[Path], undefined: bool) -> Path:
    key = hashlib.sha256("\n".join(map(str, objects)).encode()).hexdigest()[:16]
    library = BUILD / f"host-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        libraries = (
            f"-L{LIBRARIES}",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{LIBRARIES}",
            "-ldl",
            *(["-lubsan"] if undefined else []),
        )
        _run("-shared", *map(str, objects), *libraries, "-o", str(unfinished))
        unfinished.replace(library)
    return library


def _version() -> str:
    return _run("--version")


def _run(*arguments: str) -> str:
    process = subprocess.run([compiler(), *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, " ".join(arguments) + "\n" + process.stderr[-4000:]
    return process.stdout
