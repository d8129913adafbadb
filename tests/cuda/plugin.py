"""pytest -p tests.cuda.plugin: the tests of the ops, with the CUDA kernels behind them, on the host.

--sample N runs one test in N, always the same ones. With ATTN_EXT_UNDEFINED=1 in the environment, what C++ does not
define ends the process.
"""

from __future__ import annotations

import ctypes
import os
import zlib

import pytest
import torch  # noqa: F401 - its libraries, for the one below

from tests import cases
from tests.cuda import is_of_reference
from tests.cuda.compiler import host_library

# Ahead of attn_ext._C, whose own entry points it takes the place of: the linker finds the first of a name.
ctypes.CDLL(str(host_library(undefined=os.environ.get("ATTN_EXT_UNDEFINED") == "1")), mode=ctypes.RTLD_GLOBAL)
cases.KERNELS = "cuda"

# What is of the CPU's kernels, or of memory that the shim's log takes a share of.
OTHERS = ("test_resident_size_is_flat",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=1, metavar="N", help="run one test in N")


def pytest_report_header(config: pytest.Config) -> str:
    return "attn_ext: CUDA kernels on the host, by tests/cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_wanted(item: pytest.Item) -> bool:
        drawn = zlib.crc32(item.nodeid.encode()) % config.getoption("sample") == 0
        return not is_of_reference(item.nodeid) and drawn and getattr(item, "originalname", item.name) not in OTHERS

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]
