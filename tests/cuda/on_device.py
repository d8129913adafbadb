"""pytest -p tests.cuda.on_device: what tests make on the CPU, by the CPU's random numbers, lies on the GPU.

ATTN_EXT_TEST_DEVICE names another device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("ATTN_EXT_TEST_DEVICE", "cuda")


class OnDevice(TorchFunctionMode):
    """Moves what torch's factories return, where no device was asked for."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(named or {}))
        made_here = function in _device_constructors() and (named or {}).get("device") is None
        if made_here and isinstance(result, Tensor) and result.device.type == "cpu":
            return result.detach().to(DEVICE).requires_grad_(result.requires_grad)
        return result


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with OnDevice():
        yield


def pytest_report_header(config: pytest.Config) -> str:
    return f"attn_ext: tensors lie on {DEVICE}"
