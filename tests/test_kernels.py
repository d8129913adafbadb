"""The CPU kernels by themselves (tests/kernels/check*.cpp): under sanitizers, and compiled for another processor."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.limits import running_capability
from tests.compilers import AARCH64, KERNELS, KERNELS_FLAGS, SHIPPED, compile_program, of_capability

SOURCES = (*KERNELS, "tests/kernels/check.cpp")
CENTRING = ("csrc/cpu/kernels/centring.cpp", "tests/kernels/check_centring.cpp")
LIBRARIES = Path(torch.__file__).with_name("lib")  # PyTorch's vectors call its exponential of float64


def assert_passes(*command: str, **environment: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert process.stdout.endswith(" problems, 0 failed\n")


def sanitized(name: str, sources: tuple[str, ...], capability: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    return compile_program(
        name,
        compiler,
        sources,
        (*KERNELS_FLAGS, *of_capability(capability), "-O1", "-g1", *sanitizers),
        (f"-L{LIBRARIES}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{LIBRARIES}"),
    )


@pytest.mark.fused
def test_under_sanitizers() -> None:
    """No read or write out of bounds, however odd the sizes, the strides and the division of the work."""
    program = sanitized("check-sanitized", SOURCES, running_capability())
    assert_passes(str(program), "1", "400", ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.fused
def test_centring_under_sanitizers() -> None:
    """The same of the averages that are taken off a memory of halves."""
    program = sanitized("check-centring-sanitized", CENTRING, running_capability())
    assert_passes(str(program), "1", "400", ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.fused
def test_projections_under_sanitizers() -> None:
    """The same of the products with a weight, by the kernels that there are with AVX-512 and with AMX."""
    capability = running_capability()
    if not capability.startswith("avx512"):
        pytest.skip(f"projections have kernels of their own with AVX-512, not with {capability}")
    capability = "avx512_amx" if capability == "avx512_amx" else "avx512"  # with AVX512_BF16 they are AVX512's
    sources = ("csrc/cpu/kernels/matmul.cpp", "tests/kernels/check_matmul.cpp")
    program = sanitized("check-matmul-sanitized", sources, capability)
    assert_passes(str(program), "1", "400", ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.parametrize(("sources", "count"), [(SOURCES, 60), (CENTRING, 200)], ids=["attention", "centring"])
def test_on_aarch64(sources: tuple[str, ...], count: int) -> None:
    """The same source, compiled for ARM's 64-bit processors and run by an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(
            "there is no aarch64-linux-gnu-g++ or no qemu-aarch64 here (Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    name = f"{Path(sources[-1]).stem}-aarch64".replace("_", "-")
    program = compile_program(name, compiler, sources, (*KERNELS_FLAGS, *AARCH64, *SHIPPED), ("-static",))
    assert_passes(emulator, str(program), "1", str(count))
