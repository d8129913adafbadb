"""pytest -p tests.cuda.on_device: what tests make on the CPU, by the CPU's random numbers, lies on the GPU.

ATTN_EXT_TEST_DEVICE names another device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from tests.cuda import is_of_reference

DEVICE = os.environ.get("ATTN_EXT_TEST_DEVICE", "cuda")


def moved(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, whose tensors lie on DEVICE where no device was asked for."""

    @wraps(factory)
    def make(*arguments: Any, **named: Any) -> Any:
        result = factory(*arguments, **named)
        if named.get("device") is None and isinstance(result, Tensor) and result.device.type == "cpu":
            return result.detach().to(DEVICE).requires_grad_(result.requires_grad)
        return result

    return make


def factories() -> Iterator[tuple[str, Callable[..., Any]]]:
    """torch's, by name."""
    for factory in _device_constructors():
        if getattr(torch, factory.__name__, None) is factory:
            yield factory.__name__, factory


def pytest_configure(config: pytest.Config) -> None:
    # Forward mode compiles code of its own, at its first use, that is to name torch's own factories.
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    # Not by a mode: under one, calls do not go the shortest way to the ops. And before the tests are imported.
    for name, factory in list(factories()):
        setattr(torch, name, moved(factory))
    # torch.compile keeps a number that changes open by way of a tensor on the CPU, made by these factories.
    torch._dynamo.config.specialize_float = True
    from tests import cases

    cases.DEVICE = cases.KERNELS = torch.device(DEVICE).type
    config.pluginmanager.register(Failures(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_other(item: pytest.Item) -> bool:
        of_cpu = item.get_closest_marker("cpu") is not None and torch.device(DEVICE).type != "cpu"
        return is_of_reference(item.nodeid) or of_cpu

    others = [item for item in items if is_other(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if not is_other(item)]


class Failures:
    """Says each at once: the time may end the run before its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(crash.message if crash else report.longrepr).strip().splitlines()
            terminal.write_line(f"FAILED {report.nodeid} - {' | '.join(lines)[:600]}")


def pytest_report_header(config: pytest.Config) -> str:
    return f"attn_ext: tensors lie on {DEVICE}"
