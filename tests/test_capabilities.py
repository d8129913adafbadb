"""The numbers again under the instruction sets that this machine has and would not choose (ATEN_CPU_CAPABILITY)."""

from __future__ import annotations

import pytest
import torch

from tests.processes import PACKAGE, python

# In PyTorch's order: a machine that has one has those before it.
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


@pytest.mark.fused
@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_numerics_under(capability: str) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    if own not in CAPABILITIES or CAPABILITIES.index(own) <= CAPABILITIES.index(capability):
        pytest.skip(f"this run is at {own} already")
    process = python(
        *("-m", "pytest", "-m", "numerics", "-q", "--tb=line", "-p", "no:cacheprovider", "tests"),
        cwd=PACKAGE.parent,
        ATEN_CPU_CAPABILITY=capability.lower(),
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]
    assert "passed" in process.stdout
    assert "skipped" not in process.stdout
