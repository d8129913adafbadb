"""What torch.autocast has to say about a call's arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeVar

    from typing_extensions import TypeVarTuple, Unpack

    First = TypeVar("First")
    Others = TypeVarTuple("Others")

_ELIGIBLE = (torch.float32, torch.bfloat16, torch.float16)


def enabled(tensor: object) -> bool:
    """Whether it has a say over `tensor`; for no tensor it has none."""
    if not isinstance(tensor, Tensor) or not _is_available(tensor.device.type):
        return False
    return torch.is_autocast_enabled(tensor.device.type)


@torch.compiler.assume_constant_result  # PyTorch 2.11's torch.compile cannot trace it
def _is_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def disabled(tensor: Tensor) -> AbstractContextManager[object]:
    """For products of the types that they are given: autocast has had its say, or is none of the call's business."""
    return torch.autocast(tensor.device.type, enabled=False) if enabled(tensor) else nullcontext()


def dtype_of(tensor: Tensor) -> torch.dtype:
    """The dtype in which torch.nn.functional.linear would take `tensor`."""
    if tensor.dtype in _ELIGIBLE and enabled(tensor):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def cast(first: First, *others: Unpack[Others]) -> tuple[First, Unpack[Others]]:
    """The tensors as torch.nn.functional.linear would take them; what is none stays as it is."""
    tensors = (first, *others)
    if not enabled(first):
        return tensors
    return tuple(t.to(dtype_of(t)) if isinstance(t, Tensor) else t for t in tensors)  # type: ignore[return-value]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` in `other`'s dtype, where autocast would have it meet others in a dtype that neither may have."""
    is_cast = enabled(tensor) and tensor.dtype in _ELIGIBLE and other.dtype in _ELIGIBLE
    return tensor.to(other.dtype) if is_cast else tensor
