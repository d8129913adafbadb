"""What is compiled: that it is, that it loads, and what `python -m attn_ext.info` says of it."""

from __future__ import annotations

import os

import pytest
import torch

import attn_ext
from attn_ext import backend
from tests.processes import PACKAGE, info

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
@pytest.mark.numerics
def test_kernels_obey_the_machine_and_the_environment() -> None:
    """PyTorch's own reading of the CPU and of ATEN_CPU_CAPABILITY decides which kernels run."""
    wanted = KERNELS.get(torch.backends.cpu.get_cpu_capability(), "default")
    if wanted == "avx512" and "ATEN_CPU_CAPABILITY" not in os.environ and torch.cpu._is_avx512_bf16_supported():
        wanted = "avx512_bf16"
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
    assert lines["cpu tensors run"] == "fused, default kernels"


def test_info_of_the_reference() -> None:
    lines = info(PACKAGE.parent, ATTN_EXT_BACKEND="reference")
    assert lines["backend"] == "reference"
    assert lines["cpu tensors run"] == "reference, as chosen"
