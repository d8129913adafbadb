"""What is compiled: that it is, that it loads, and what `python -m attn_ext.info` says of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import attn_ext
from attn_ext import backend
from tests.compilers import NotBuiltError, shipped_kernels
from tests.processes import PACKAGE, info, python

KERNELS = {"AVX2": "avx2", "AVX512": "avx512"}


@pytest.mark.skipif(backend.current() == "reference", reason=f"{backend.ENVIRONMENT_VARIABLE}=reference")
def test_the_extension_is_built() -> None:
    """The tests of the compiled ops are skipped where there are none: that must not pass for success."""
    assert backend.unavailable() is None


@pytest.mark.fused
def test_build_facts() -> None:
    facts = backend.build_facts()
    assert facts["torch_version"] == torch.__version__
    assert all(facts[name] for name in ("compiler", "cpu_capabilities", "cuda"))


@pytest.mark.fused
def test_instruction_sets_share_no_code() -> None:
    """Of what several compilations have, the linker keeps one: it could be one that not every processor runs."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm here (Debian: binutils)")
    for capability in backend.build_facts()["cpu_capabilities"].split(", "):
        try:
            objects = shipped_kernels(capability)
        except NotBuiltError as error:
            pytest.skip(str(error))
        process = subprocess.run([nm, "--defined-only", *objects], capture_output=True, text=True, check=True)
        shared = re.findall(r"^\w+ [uVW] (_Z.*)$", process.stdout, re.MULTILINE)
        own = f"{len(capability)}{capability}"  # the namespace, PyTorch's vectors' too
        assert [name for name in shared if own not in name] == []


@pytest.mark.fused
@pytest.mark.numerics
def test_kernels_obey_the_machine_and_the_environment() -> None:
    """PyTorch's own reading of the CPU and of ATEN_CPU_CAPABILITY decides which kernels run."""
    wanted = KERNELS.get(torch.backends.cpu.get_cpu_capability(), "default")
    if wanted == "avx512" and "ATEN_CPU_CAPABILITY" not in os.environ and torch.cpu._is_avx512_bf16_supported():
        wanted = "avx512_amx" if torch.cpu._is_amx_tile_supported() else "avx512_bf16"
    assert torch.ops.attn_ext.cpu_capability() == wanted
    assert wanted.upper() in backend.build_facts()["cpu_capabilities"].split(", ")


@pytest.mark.fused
def test_info_of_the_fused_ops() -> None:
    lines = info(PACKAGE.parent, ATEN_CPU_CAPABILITY="default", ATTN_EXT_BACKEND="auto")
    assert lines["attn_ext"] == attn_ext.__version__
    assert lines["PyTorch"].startswith(torch.__version__)
    assert lines["extension"].startswith(f"built for PyTorch {torch.__version__} by ")
    assert "DEFAULT" in lines["CPU kernels"]
    assert lines["backend"] == "auto"
    assert lines["cpu tensors run"] == "fused, default kernels, PyTorch's float32 projections"


def test_info_of_the_reference() -> None:
    lines = info(PACKAGE.parent, ATTN_EXT_BACKEND="reference")
    assert lines["backend"] == "reference"
    assert lines["cpu tensors run"] == "reference, as chosen"


def said_with_toolkit(folder: Path, toolkit: str, pytorch: str, has_headers: bool) -> str:
    """What setup.py says of a CUDA toolkit in `folder`, and a PyTorch for another CUDA perhaps."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {toolkit}, V{toolkit}.0'\n")
    nvcc.chmod(0o755)
    if has_headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    program = f"""
import runpy, sys, torch, torch.utils.cpp_extension as extension
torch.version.cuda, extension.CUDA_HOME, sys.argv = {pytorch!r}, {str(folder)!r}, ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
    return python(
        "-c", program, cwd=PACKAGE.parent, ATTN_EXT_CPU_ONLY="", FORCE_CUDA="", TORCH_CUDA_ARCH_LIST=""
    ).stdout


@pytest.mark.parametrize("has_headers", [False, True])
def test_an_nvcc_without_its_toolkit_is_no_cuda(tmp_path: Path, has_headers: bool) -> None:
    """The CPU is built for all the same: an nvcc on the PATH may be a script that calls one somewhere else."""
    said = said_with_toolkit(tmp_path, "13.0", "13.0", has_headers)
    assert "attn_ext: CUDA yes" in said if has_headers else "has nvcc but no cuda_runtime.h" in said


@pytest.mark.parametrize(
    ("toolkit", "pytorch", "expected"),
    [
        ("13.0", "13.0", "CUDA targets are 7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("12.8", "12.6", "CUDA targets are 7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("12.6", "12.6", "CUDA targets are 7.5;8.0;8.6;8.9;9.0+PTX"),
        ("12.2", "12.6", "CUDA no: the CUDA toolkit is 12.2, needed is 12.3 or later"),
        ("12.10", "13.0", "CUDA no: the CUDA toolkit is 12.10, but PyTorch"),
    ],
)
def test_what_a_toolkit_builds_for(tmp_path: Path, toolkit: str, pytorch: str, expected: str) -> None:
    """Where no GPU is visible, all architectures that it knows."""
    assert f"attn_ext: {expected}" in said_with_toolkit(tmp_path, toolkit, pytorch, has_headers=True)
