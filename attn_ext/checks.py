"""Argument checks: a ValueError or TypeError that names the argument, what came, and what is needed."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from attn_ext import autocast

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tensors that Python makes nothing else of.
PLAIN = (Tensor, torch.nn.Parameter)


class Arguments:
    """Checks one call's arguments against each other: the first to name a size, dtype or device fixes it."""

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.sizes: dict[str, int] = {}
        self.fixed_by: dict[str, str] = {}
        self.leader: tuple[str, Tensor] | None = None
        self._cast: list[Tensor] = []

    def came_from_autocast(self, given: Sequence[object], cast: Sequence[object]) -> None:
        """What torch.autocast made of the arguments, whose dtypes are then not those that were given."""
        self._cast = [new for old, new in zip(given, cast, strict=True) if isinstance(new, Tensor) and new is not old]

    def floating(self, name: str, value: object, dims: str) -> None:
        """`value` is a float tensor of shape `dims` ("B S Dm"), with the dtype and device of the first one checked.

        Under autocast it is the dtype that they are going to have which is the same.
        """
        self.tensor(name, value)
        assert isinstance(value, Tensor)
        if value.dtype not in DTYPES:
            raise TypeError(
                f"{self.caller}: {name} is {value.dtype}; needed is one of {', '.join(str(d) for d in DTYPES)}"
            )
        if self.leader is None:
            self.leader = (name, value)
        leader_name, leader = self.leader
        if autocast.dtype_of(value) != autocast.dtype_of(leader):
            raise TypeError(
                f"{self.caller}: {name} is {self._dtype(value)}, but {leader_name} is {self._dtype(leader)}; "
                "they must be the same"
            )
        self.device(name, value)
        self.shape(name, value, dims)

    def _dtype(self, tensor: Tensor) -> str:
        is_cast = any(tensor is each for each in self._cast)
        return f"{tensor.dtype}, as torch.autocast made it" if is_cast else str(tensor.dtype)

    def tensor(self, name: str, value: object) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.caller}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{self.caller}: {name} must be a dense (strided) tensor, got layout {value.layout}")
        if value.is_nested:  # one of layout torch.strided has no shape to check
            raise TypeError(f"{self.caller}: {name} must be a dense (strided) tensor, got a nested one")

    def device(self, name: str, value: Tensor) -> None:
        assert self.leader is not None
        leader_name, leader = self.leader
        if value.device != leader.device:
            raise ValueError(
                f"{self.caller}: {name} is on {value.device}, but {leader_name} is on {leader.device}; "
                "they must be on the same device"
            )

    def shape(self, name: str, value: Tensor, dims: str) -> None:
        """Binds the sizes that `dims` names and refuses one that clashes with an earlier argument's."""
        needed = dims.split()
        if value.dim() != len(needed) or any(
            self.sizes.get(dim, size) != size for dim, size in zip(needed, value.shape, strict=True)
        ):
            known = [f"{dim}={self.sizes[dim]} (from {self.fixed_by[dim]})" for dim in needed if dim in self.sizes]
            with_sizes = f" with {', '.join(known)}" if known else ""
            raise ValueError(
                f"{self.caller}: {name} has shape {list(value.shape)}, needed is [{', '.join(needed)}]{with_sizes}"
            )
        for dim, size in zip(needed, value.shape, strict=True):
            self.bind(dim, size, name)

    def bind(self, dim: str, size: int, name: str) -> None:
        self.sizes.setdefault(dim, size)
        self.fixed_by.setdefault(dim, name)

    def lengths(self, value: Tensor | Collection[int] | None) -> Tensor | None:
        """[B] integers in [0, S], as int64 on the leader's device; the range is checked where the CPU can see it."""
        if value is None:
            return None
        if not isinstance(value, Tensor) and torch.compiler.is_compiling() and getattr(value, "ndim", 0) == 1:
            value = torch.as_tensor(value)  # NumPy's, whose elements torch.compile cannot look at one by one
        lengths = value if isinstance(value, Tensor) else self._row_of_integers(value)
        self.tensor("lengths", lengths)
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{self.caller}: lengths must be integers, got {lengths.dtype}")
        lengths = lengths.to(torch.int64)
        self.shape("lengths", lengths, "B")
        # Lengths on the CPU serve tensors on any device: pack_padded_sequence wants them there too.
        if lengths.device.type != "cpu":
            self.device("lengths", lengths)
        elif type(lengths) in PLAIN and not torch.compiler.is_compiling():
            if lengths.numel():
                self._check_range(*(int(n) for n in torch.aminmax(lengths)))
            lengths = self._pinned(lengths)
        assert self.leader is not None
        return lengths.to(self.leader[1].device, non_blocking=True)

    def _row_of_integers(self, value: Collection[int]) -> Tensor:
        # An array of NumPy's is no Sequence, and without dimensions cannot be gone through.
        is_row = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1
        numbers = [_as_int(n) for n in value] if is_row else [None]
        known = [n for n in numbers if n is not None]
        if len(known) < len(numbers):
            raise TypeError(f"{self.caller}: lengths must be integers, [B], got {type(value).__name__} {value!r}")
        if torch.compiler.is_compiling() and known and len(known) == self.sizes.get("B"):
            self._check_range(min(known), max(known))  # those of a tensor are not known until it runs
        longest_possible = torch.iinfo(torch.int64).max
        return torch.tensor([min(max(n, -1), longest_possible) for n in known], dtype=torch.int64, device="cpu")

    def _check_range(self, shortest: int, longest: int) -> None:
        if shortest < 0 or longest > self.sizes["S"]:
            raise ValueError(
                f"{self.caller}: lengths go from {shortest} to {longest}, "
                f"needed is 0 <= length <= S={self.sizes['S']} (from {self.fixed_by['S']})"
            )

    def _pinned(self, lengths: Tensor) -> Tensor:
        """Lengths for a GPU as a copy of their own: the caller may write the next batch's before the GPU has them."""
        assert self.leader is not None
        if self.leader[1].device.type != "cuda" or not torch.cuda.is_initialized():
            return lengths
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{self.caller}: lengths are on the CPU, from where the graph that is being captured would copy "
                "them at every replay; needed is a tensor on the GPU"
            )
        return torch.empty(lengths.shape, dtype=lengths.dtype, pin_memory=True).copy_(lengths)

    def mask(self, value: Tensor | None) -> None:
        """[B, S] or [B, T, S] bool, True = may be attended."""
        if value is None:
            return
        self.tensor("mask", value)
        if value.dtype != torch.bool:
            raise TypeError(
                f"{self.caller}: mask must be torch.bool (True = may be attended), got {value.dtype}; "
                "additive float masks are not supported"
            )
        self.device("mask", value)
        if value.dim() not in (2, 3):
            sizes = ", ".join(f"{dim}={self.sizes[dim]}" for dim in "BTS" if dim in self.sizes)
            raise ValueError(
                f"{self.caller}: mask has shape {list(value.shape)}, needed is [B, S] or [B, T, S] with {sizes}"
            )
        self.shape("mask", value, "B S" if value.dim() == 2 else "B T S")

    def flag(self, name: str, value: object) -> None:
        flag(self.caller, name, value)

    def scale(self, value: float | None) -> float:
        if value is None:
            return 1.0
        if not _is_number(value):
            if torch.compiler.is_compiling() and not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0:
                return float(value)  # NumPy's number, which torch.compile has as an array
            raise TypeError(f"{self.caller}: scale must be a number or None, got {_kind(value)}")
        scale = _as_float(value)
        if not -math.inf < scale < math.inf:  # which torch.compile can trace
            raise ValueError(f"{self.caller}: scale is {value}, needed is a finite number")
        return scale


def choice(caller: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """`value` is one of the strings `allowed`."""
    if not isinstance(value, str) or value not in allowed:  # an array of strings is compared one by one
        raise ValueError(f"{caller}: {name} is {value!r}, needed is one of {', '.join(map(repr, allowed))}")


def flag(caller: str, name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be True or False, got {_kind(value)}")


def device(caller: str, name: str, value: torch.device | str | int | None) -> None:
    """`value` names a device, or is None."""
    try:
        torch.device(value if value is not None else "cpu")
    except (RuntimeError, TypeError) as error:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{caller}: {name} is {value!r}, needed is a torch.device, its name, or None") from error


def integer(caller: str, name: str, value: object) -> int:
    """`value` as an int: whatever is one, NumPy's too, but a bool."""
    number = _as_int(value)
    if number is None:
        raise TypeError(f"{caller}: {name} must be an integer, got {_kind(value)}")
    return number


def positive(caller: str, **sizes: int) -> list[int]:
    """Every one of `sizes` is a positive integer, and returned as an int."""
    numbers = [integer(caller, name, size) for name, size in sizes.items()]
    for name, number in zip(sizes, numbers, strict=True):
        if number <= 0:
            raise ValueError(f"{caller}: {name} is {number}, needed is at least 1")
    return numbers


def fraction(caller: str, name: str, value: float) -> float:
    """`value` as a float: a number in [0, 1]."""
    _number(caller, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{caller}: {name} is {value}, needed is 0 <= {name} <= 1")
    return _as_float(value)


def not_negative(caller: str, name: str, value: float) -> float:
    """`value` as a float, inf where it is beyond one: a finite number of at least 0."""
    _number(caller, name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{caller}: {name} is {value}, needed is a finite number of at least 0")
    return _as_float(value)


def _as_int(value: object) -> int | None:
    if type(value) is int:
        return value
    # A tensor would be waited for.
    if isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # NumPy's bool, or an array
        return None


def _as_float(value: float) -> float:
    """inf for an integer that is beyond a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _number(caller: str, name: str, value: float) -> None:
    if not _is_number(value):
        raise TypeError(f"{caller}: {name} must be a number, got {_kind(value)}")


def _is_number(value: object) -> bool:
    """NumPy's are, too, but no bool."""
    return not isinstance(value, bool) and isinstance(value, (int, float, numbers.Real))


def _kind(value: object) -> str:
    """A type's name: NumPy's bool is another than Python's."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
