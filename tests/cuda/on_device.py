"""pytest -p tests.cuda.on_device: what tests make on the CPU, by the CPU's random numbers, lies on the GPU.

ATTN_EXT_TEST_DEVICE names another device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("ATTN_EXT_TEST_DEVICE", "cuda")

# Nobody waits for a GPU to see its lengths; and functorch compiles code of its own that names the factories.
OTHERS = ("test_lengths_out_of_range", "test_transforms_that_are_not_there_say_so")


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
    # Not by a mode: under one, calls do not go the shortest way to the ops. And before the tests are imported.
    for name, factory in list(factories()):
        setattr(torch, name, moved(factory))
    from tests import cases

    cases.KERNELS = torch.device(DEVICE).type


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if getattr(item, "originalname", item.name) in OTHERS]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def pytest_report_header(config: pytest.Config) -> str:
    return f"attn_ext: tensors lie on {DEVICE}"
