"""A case's inputs, its results under any backend, and how near they must be to the float64 reference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import attn_ext
from benchmarks.gpu_calls import keyed_dot

FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "dot": attn_ext.dot_attention,
    "additive": attn_ext.additive_attention,
    "general": partial(attn_ext.luong_attention, method="general"),
    "concat": partial(attn_ext.luong_attention, method="concat"),
    "keyed_dot": keyed_dot,
}
METHODS = ("dot", "additive", "general", "concat")  # the public ones
MASKINGS = ("none", "lengths", "rows", "pairs", "lengths+rows", "lengths+pairs")
# What the loss is made of; "no_weights" also asks for none.
LOSSES = {"both": ("context", "weights"), "context": ("context",), "weights": ("weights",), "no_weights": ("context",)}
# The types of the devices that tensors lie on, and whose kernels run; tests/cuda says otherwise.
DEVICE = KERNELS = "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# As exact as the factors of float32's products are to be, by PyTorch's precision.
FACTORS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One call, in words: D is the size of the query (and of concat's attention), Dm the memory's (dot: D)."""

    method: str
    B: int = 2
    T: int = 3
    S: int = 5
    D: int = 4
    Dm: int = 6
    dtype: torch.dtype = torch.float32
    masking: str = "none"
    loss: str = "both"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.method == "dot":
            object.__setattr__(self, "Dm", self.D)

    def __str__(self) -> str:
        sizes = [self.B, self.T, self.S, self.D] + ([] if self.method == "dot" else [self.Dm])
        scale = "" if self.scale is None else f"-scale={self.scale:g}"
        return f"{self.method}-{'x'.join(map(str, sizes))}-{short(self.dtype)}-{self.masking}-{self.loss}{scale}"

    def problem(self) -> Problem:
        """Random inputs, the same at every call, sized so that scores and gradients are of order 1."""
        B, T, S, D, Dm = self.B, self.T, self.S, self.D, self.Dm
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(self.dtype)

        if self.method in ("dot", "general"):
            tensors = {"query": normal(B, T, D, spread=2 * _over_root(Dm)), "memory": normal(B, S, Dm)}
            if self.method == "general":
                tensors["weight"] = normal(Dm, D, spread=_over_root(D))
        elif self.method == "keyed_dot":
            # Bounded: a query of one feature attends to the largest key of many, and terms would not be of order 1.
            keys = math.sqrt(3) * (2 * torch.rand(B, S, D, generator=generator, dtype=torch.float64) - 1)
            tensors = {
                "query": normal(B, T, D, spread=2 * _over_root(D)),
                "keys": keys.to(self.dtype),
                "values": normal(B, S, Dm),
            }
        elif self.method == "additive":
            tensors = {"query": normal(B, T, D), "keys": normal(B, S, D), "values": normal(B, S, Dm)}
        else:
            tensors = {"query": normal(B, T, D), "memory": normal(B, S, Dm)}
            tensors |= {"weight": normal(D, D + Dm, spread=_over_root(D + Dm)), "bias": normal(D)}
        if self.method in ("additive", "concat"):
            tensors["v"] = normal(D, spread=2 * _over_root(D))
        grad_outputs = {"context": normal(B, T, Dm, spread=_over_root(Dm)), "weights": normal(B, T, S)}
        return Problem(
            FUNCTIONS[self.method],
            tensors,
            self._options(generator),
            {name: grad_outputs[name] for name in LOSSES[self.loss]},
        )

    def _options(self, generator: torch.Generator) -> dict[str, Any]:
        B, T, S = self.B, self.T, self.S
        lengths, mask = None, None
        if "lengths" in self.masking:
            lengths = torch.randint(0, S + 1, (B,), generator=generator)
            if B > 1:
                lengths[0], lengths[-1] = S, 0
        if "rows" in self.masking:
            mask = torch.rand(B, S, generator=generator) < 0.7
        elif "pairs" in self.masking:
            mask = torch.rand(B, T, S, generator=generator) < 0.7
        return {"lengths": lengths, "mask": mask, "scale": self.scale, "need_weights": self.loss != "no_weights"}


@dataclass(frozen=True)
class Problem:
    """A call with its inputs, and the gradients that flow back through its outputs."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    grad_outputs: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["query"].dtype

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()},
            grad_outputs={name: grad.to(dtype) for name, grad in self.grad_outputs.items()},
        )

    def with_tensors(self, **changes: Tensor) -> Problem:
        return replace(self, tensors=self.tensors | changes)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients by name ("context", "weights", "grad query", ...) under the backend in force."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        context, weights = self.function(**leaves, **self.options)
        outputs = {"context": context} if weights is None else {"context": context, "weights": weights}
        grads = torch.autograd.grad(
            [outputs[name] for name in self.grad_outputs],
            list(leaves.values()),
            list(self.grad_outputs.values()),
            materialize_grads=True,
        )
        named_grads = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {name: tensor.detach() for name, tensor in (outputs | named_grads).items()}

    def reference_results(self) -> dict[str, Tensor]:
        with attn_ext.use_backend("reference"):
            return self.results()


def assert_accurate(problem: Problem) -> None:
    """Against the float64 reference, at most twice the reference's own error at this dtype, plus rounding noise."""
    results = problem.results()
    truth = problem.to(torch.float64).reference_results()
    # The reference's own error in float64 is its error in float32, at float64's resolution.
    own_dtype = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    resolution = torch.finfo(problem.dtype).eps / torch.finfo(own_dtype).eps
    own_problem = problem.to(own_dtype)
    own_results = own_problem.reference_results()
    own_truth = truth if own_dtype == problem.dtype else own_problem.to(torch.float64).reference_results()
    assert list(results) == list(truth)
    for name, result in results.items():
        assert (result.shape, result.dtype) == (truth[name].shape, problem.dtype), name
        error = _largest(result.double() - truth[name])
        own_error = _largest(own_results[name].double() - own_truth[name]) * resolution
        times = 2 if own_dtype == problem.dtype else 3  # in float64 the truth has that error, too
        allowed = times * own_error + rounding_noise(problem.dtype, _largest(truth[name]))
        assert error <= allowed, (
            f"{name}: error {error:.2e}, allowed {allowed:.2e}, the reference's own {own_error:.2e}"
        )


def rounding_noise(dtype: torch.dtype, largest: float) -> float:
    """One rounding of the result, and a few of the sums behind it, whose terms are of order 1 where they cancel."""
    accumulation = torch.promote_types(dtype, torch.float32)  # halves sum in float32
    noise = torch.finfo(dtype).eps * largest + 32 * torch.finfo(accumulation).eps * (1 + largest)
    if KERNELS == "cuda" and dtype != accumulation:
        noise += torch.finfo(dtype).eps / 4  # a GPU's products take weights, and their gradients, as halves
    return noise


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit: NaN would differ from itself, so there is none either."""
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def spoiled(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same argument with something wrong about it."""
    yield "one dimension more", tensor.unsqueeze(0)
    yield "no dimension", tensor.new_zeros(())
    yield "empty", tensor.new_zeros(0)
    if tensor.dim() > 1:
        yield "flat", tensor.flatten()
    for dim, size in enumerate(tensor.shape):
        yield f"size {size - 1} in dim {dim}", tensor.narrow(dim, 0, size - 1)
        yield f"size {size + 1} in dim {dim}", torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64, torch.int32, torch.int64, torch.bool):
        if dtype != tensor.dtype:
            yield f"dtype {dtype}", tensor.to(dtype)
    yield "layout sparse", tensor.to_sparse()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _over_root(size: int) -> float:
    return 1 / math.sqrt(max(size, 1))
