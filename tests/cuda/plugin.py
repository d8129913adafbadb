"""pytest -p tests.cuda.plugin: the tests of the ops, with the CUDA kernels behind them, on the host."""

from __future__ import annotations

import ctypes

import pytest
import torch  # noqa: F401 - its libraries, for the one below

from tests.cuda.compiler import host_library

# Ahead of attn_ext._C, whose own entry points it takes the place of: the linker finds the first of a name.
ctypes.CDLL(str(host_library()), mode=ctypes.RTLD_GLOBAL)


def pytest_report_header(config: pytest.Config) -> str:
    return "attn_ext: CUDA kernels on the host, by tests/cuda"
