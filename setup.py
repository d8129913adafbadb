"""Builds attn_ext: the ops library attn_ext._C, and two pybind11 modules: attn_ext._calls and attn_ext._build_info.

Environment: ATTN_EXT_CPU_ONLY=1 leaves CUDA out, FORCE_CUDA=1 insists on it, TORCH_CUDA_ARCH_LIST names its targets,
MAX_JOBS the parallel compilations.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
CUDA_ARCHITECTURES_BEFORE_12_8 = "7.5;8.0;8.6;8.9;9.0+PTX"  # all that such a toolkit knows
OLDEST_TOOLKIT = (12, 3)  # which has cudaFuncGetName

# The kernels' compilations. PyTorch's own names for CPU capabilities, and the flags it compiles them with, and
# two beyond them, for which its headers are AVX512's.
CPU_CAPABILITIES = {"DEFAULT": []}
if platform.machine() == "aarch64":
    # gcc orders instructions before it gives them registers, of which it then has too few.
    CPU_CAPABILITIES["DEFAULT"] = ["-fno-schedule-insns"]
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_CAPABILITIES["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
    CPU_CAPABILITIES["AVX512_BF16"] = [*CPU_CAPABILITIES["AVX512"], "-DCPU_CAPABILITY_AVX512", "-mavx512bf16"]
    CPU_CAPABILITIES["AVX512_AMX"] = [*CPU_CAPABILITIES["AVX512_BF16"], "-mamx-tile", "-mamx-bf16"]

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp"]
# Warnings are for our own code: PyTorch's headers become system headers, and GCC 12 sees uninitialised values in its
# own intrinsics.
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
CXX_FLAGS += [f"-isystem{path}" for path in include_paths("cpu")]

# The process's C++ library, PyTorch's, comes before the copy that some compilers link into every library. Two do not
# know each other's streams: an error whose text has a number in it would end the process.
LINK_FLAGS = ["-l:libstdc++.so.6"] if sys.platform == "linux" else []


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "off", "no")


def cuda_decision() -> tuple[bool, str]:
    """Whether to build for CUDA, and why."""
    built_for = torch.version.cuda
    if flag("ATTN_EXT_CPU_ONLY"):
        return False, "ATTN_EXT_CPU_ONLY is set"
    obstacle = None
    if built_for is None:
        obstacle = f"PyTorch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None:
        obstacle = "no CUDA toolkit was found (set CUDA_HOME, or put nvcc on the PATH)"
    elif (toolkit := toolkit_version()) is None:
        obstacle = f"{CUDA_HOME} has no working nvcc"
    elif toolkit[0] != int(built_for.split(".")[0]):
        found = ".".join(map(str, toolkit))
        obstacle = f"the CUDA toolkit is {found}, but PyTorch {torch.__version__} is built for CUDA {built_for}"
    elif toolkit < OLDEST_TOOLKIT:
        found, needed = (".".join(map(str, version)) for version in (toolkit, OLDEST_TOOLKIT))
        obstacle = f"the CUDA toolkit is {found}, needed is {needed} or later"
    elif not any(Path(path, "cuda_runtime.h").exists() for path in include_paths("cuda")):
        # An nvcc on the PATH may be a script that calls the toolkit's.
        obstacle = f"{CUDA_HOME} has nvcc but no cuda_runtime.h (set CUDA_HOME to the toolkit's folder)"
    if flag("FORCE_CUDA"):
        if obstacle is not None:
            sys.exit(f"attn_ext: FORCE_CUDA is set, but {obstacle}")
        return True, "FORCE_CUDA is set"
    if obstacle is not None:
        return False, obstacle
    found = ".".join(map(str, toolkit_version() or ()))
    return True, f"PyTorch {torch.__version__} is built for CUDA {built_for}, and the toolkit is {found}"


def toolkit_version() -> tuple[int, int] | None:
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def choose_cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, or the visible GPUs' (PyTorch's default), or everything where there are none to look at."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return asked
    if torch.cuda.is_available() and not flag("FORCE_CUDA"):
        return "the visible GPUs"
    toolkit = toolkit_version()
    architectures = CUDA_ARCHITECTURES_BEFORE_12_8 if toolkit is not None and toolkit < (12, 8) else CUDA_ARCHITECTURES
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    return architectures


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern))


class Build(BuildExtension):
    """Compiles the kernels once for each CPU capability, then the rest, in a folder shared by every way of building."""

    def build_extension(self, extension: Extension) -> None:
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch-{torch.__version__}"
        self.build_temp = str(Path("build", tag, extension.name))
        # setuptools knows nothing of the kernels' objects and headers: it is always linked.
        self.force = True
        if extension.name == "attn_ext._C":
            extension.extra_objects += self.compile_kernels(extension)
        super().build_extension(extension)

    def copy_extensions_to_source(self) -> None:
        # Written over, a library that a running process has mapped would crash it; unlinked, it stays whole.
        for library in Path("attn_ext").glob("*.so"):
            library.unlink()
        super().copy_extensions_to_source()

    def compile_kernels(self, extension: Extension) -> list[str]:
        """Side by side, MAX_JOBS at a time: a change to one kernel file is one compilation for each capability."""

        def compile_one(source_and_capability: tuple[str, str]) -> list[str]:
            source, capability = source_and_capability
            defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
            folder = Path(self.build_temp, capability, Path(source).stem)  # of its own: ninja leaves a file there
            folder.mkdir(parents=True, exist_ok=True)
            return self.compiler.compile(
                [source],
                output_dir=str(folder),
                include_dirs=extension.include_dirs,
                extra_postargs={"cxx": [*CXX_FLAGS, *defines, *CPU_CAPABILITIES[capability]]},
            )

        asked = os.environ.get("MAX_JOBS", "")  # what is no number PyTorch passes over, too
        jobs = int(asked) if asked.isdigit() else os.cpu_count() or 1
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            # DEFAULT's come first, which the linker keeps of what several have (of ours nothing: tests/test_build.py).
            compiled = pool.map(compile_one, product(sources("csrc/cpu/kernels", "*.cpp"), CPU_CAPABILITIES))
            return [object for objects in compiled for object in objects]


def find_ninja() -> None:
    """The one that pip installed beside this interpreter need not be on the PATH, where PyTorch looks for it."""
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


find_ninja()
with_cuda, reason = cuda_decision()
cuda_fact = f"{'yes' if with_cuda else 'no'}: {reason}"
print(f"attn_ext: CUDA {cuda_fact}")
print(f"attn_ext: CPU kernels for {', '.join(CPU_CAPABILITIES)}")
if with_cuda:
    print(f"attn_ext: CUDA targets are {choose_cuda_architectures()}")

facts = {
    "ATTN_EXT_TORCH_VERSION": torch.__version__,
    "ATTN_EXT_CPU_CAPABILITIES": ", ".join(CPU_CAPABILITIES),
    "ATTN_EXT_CUDA": cuda_fact,
}
build_info = Extension(
    "attn_ext._build_info",
    ["csrc/python/build_info.cpp"],
    include_dirs=include_paths("cpu"),  # PyTorch carries pybind11's headers
    extra_compile_args={"cxx": [*CXX_FLAGS, *(f'-D{name}="{value}"' for name, value in facts.items())]},
    extra_link_args=LINK_FLAGS,
    language="c++",
)
make_extension = CUDAExtension if with_cuda else CppExtension
ops = make_extension(
    "attn_ext._C",
    [
        *sources("csrc", "*.cpp"),
        *sources("csrc/cpu", "*.cpp"),
        *(sources("csrc/cuda", "*.cpp") + sources("csrc/cuda", "*.cu") if with_cuda else []),
    ],
    define_macros=[("ATTN_EXT_WITH_CUDA", None)] if with_cuda else [],
    extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-std=c++20", "-O3"]},
    extra_link_args=["-fopenmp", *LINK_FLAGS],
)

calls = CppExtension(
    "attn_ext._calls", ["csrc/python/calls.cpp"], extra_compile_args={"cxx": CXX_FLAGS}, extra_link_args=LINK_FLAGS
)

setup(ext_modules=[build_info, ops, calls], cmdclass={"build_ext": Build})
