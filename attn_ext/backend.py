"""Which implementation runs: the compiled ops ("fused") or plain PyTorch ("reference"), and why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType

import torch

from attn_ext import autograd, checks

BACKENDS = ("auto", "fused", "reference")
ENVIRONMENT_VARIABLE = "ATTN_EXT_BACKEND"
# Once unavailable() is None: attn_ext._calls, the ops without torch.ops' look at their arguments; the device types that
# have kernels in this build, "meta" standing for shape propagation; and whether projections on a CPU are the ops' own.
calls: ModuleType
fused_devices: tuple[str, ...] = ("cpu", "meta")
multiplies = False
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
BUILD_IN_PLACE = "python setup.py build_ext --inplace"


class use_backend:  # noqa: N801 - a function to its users
    """Chooses the implementation for the whole process; as a context manager, until the block ends.

    ::

        attn_ext.use_backend("reference")
        with attn_ext.use_backend("fused"):
            ...

    Args:
        name: "auto": the compiled ops where they exist for the tensors' device, otherwise the reference. "fused": the
            compiled ops, or a RuntimeError that says why not. "reference": plain PyTorch. The environment variable
            ATTN_EXT_BACKEND sets what the process starts with.

    Raises:
        ValueError: another name.
        RuntimeError: "fused" where nothing that runs is compiled.
    """

    _current = "auto"
    _choices = 0  # made so far, and blocks ended

    def __init__(self, name: str) -> None:
        checks.choice("use_backend", "name", name, BACKENDS)
        if name == "fused" and (problem := unavailable()):
            raise RuntimeError(f"use_backend: the fused ops cannot run: {problem}")
        self._name = name
        self._replaced = [use_backend._current]  # by each block that is open, and by the one that begins here
        _choose(name)
        self._choice = use_backend._choices

    def __enter__(self) -> use_backend:
        if use_backend._choices != self._choice:  # it is entered later, or once more
            self._replaced.append(use_backend._current)
            _choose(self._name)
        self._choice = 0
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _choose(self._replaced.pop())


def _choose(name: str) -> None:
    use_backend._current = name
    use_backend._choices += 1


def current() -> str:
    """The name in force."""
    return use_backend._current


def fused_runs_on(device_type: str) -> bool:
    """Whether a call on a device takes the compiled ops now. Under "auto", the first that cannot warns and says why."""
    if use_backend._current == "reference":
        return False
    if unavailable() is None and device_type in fused_devices:
        return True
    problem = why_not_on(device_type)
    if use_backend._current == "fused":
        raise RuntimeError(f"attn_ext: the backend is 'fused', but the fused ops cannot run: {problem}")
    _warn_once(problem)
    return False


@torch.compiler.assume_constant_result
def why_not_on(device_type: str) -> str | None:
    """What keeps the compiled ops from tensors of a device type and, where a command mends it, that; or None."""
    problem = unavailable()
    if problem is not None or device_type in fused_devices:
        return problem
    problem = f"no kernels are compiled for {device_type} tensors"
    facts = build_facts()
    if device_type != "cuda" or facts is None:
        return f"{problem}; there are some for the CPU and for CUDA"
    return f"{problem} (CUDA: {facts['cuda']}). To rebuild it, run in attn_ext's source folder: {REBUILD}"


@cache
def build_facts() -> dict[str, str] | None:
    """What the extension was compiled for and with; None where nothing is compiled. Loads no PyTorch library."""
    try:
        from attn_ext import _build_info  # type: ignore[attr-defined]
    except ImportError:
        return None
    return dict(_build_info.facts())


@torch.compiler.assume_constant_result  # torch.compile sees through a cache, and would trace the loading
def unavailable() -> str | None:
    """Loads the compiled ops, once; what keeps them from running and the command that mends it, or None."""
    return _load()


_loading = threading.Lock()


@cache
def _load() -> str | None:
    with _loading:  # PyTorch's libraries of ops are not for two threads at once
        return _load_library()


def _load_library() -> str | None:
    facts = build_facts()
    spec = importlib.util.find_spec("attn_ext._C")
    if facts is None or spec is None or spec.origin is None:
        source = Path(__file__).resolve().parents[1]
        if (source / "setup.py").exists():
            return (
                f"the extension is not compiled in {source}, from where attn_ext is imported. To build it, run there: "
                f"{BUILD_IN_PLACE}. If it is installed, too, Python finds that one from any other folder"
            )
        return f"the extension is not compiled. To build it, run in attn_ext's source folder: {REBUILD}"
    built_for, running = facts["torch_version"], torch.__version__
    # The C++ interface of PyTorch holds within a release; builds of one release for other devices share it.
    if built_for.split("+")[0] != running.split("+")[0]:
        return (
            f"the extension was built for PyTorch {built_for}, but this is PyTorch {running}. "
            f"To rebuild it, run in attn_ext's source folder: {REBUILD}"
        )
    global calls, fused_devices, multiplies
    try:
        torch.ops.load_library(spec.origin)
        calls = importlib.import_module("attn_ext._calls")
    except (ImportError, OSError) as error:
        return f"the extension does not load ({error}). To rebuild it, run in attn_ext's source folder: {REBUILD}"
    autograd.library()
    if torch.ops.attn_ext.cuda_build():
        fused_devices = ("cpu", "cuda", "meta")
    multiplies = torch.ops.attn_ext.cpu_multiplies()
    return None


@torch.compiler.assume_constant_result  # torch.compile would trace the warning
def _warn_once(problem: str | None) -> None:
    _warn(problem)


@cache
def _warn(problem: str | None) -> None:
    text = f"attn_ext runs its slower reference implementation, because {problem}"
    # The line to show is the user's: nn.Module's call stands between it and a module of ours.
    ours = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def _start_from_environment() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    checks.choice(ENVIRONMENT_VARIABLE, "its value", name, BACKENDS)
    use_backend._current = name


_start_from_environment()
