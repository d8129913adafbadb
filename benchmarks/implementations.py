"""What is timed: implementations behind the signature of attn_ext.luong_attention, and the calls made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from benchmarks.shapes import Shape

METHODS = ("dot", "general", "concat")
OPS = ("dot", "general", "additive")  # additive is concat with its projections done: additive_attention
DIRECTIONS = ("forward", "forward+backward")

NO_WEIGHTS = "fused, no weights"  # the fused op's name where it is timed for peers that return no weights

Results = tuple[Tensor, Tensor | None]


def keep_compiled_apart() -> None:
    """Gives torch.compile a folder for each instruction set (ATEN_CPU_CAPABILITY).

    Its cache does not tell them apart: loops over AVX2's vectors that are kept from one run, and compiled with
    AVX-512's in the next, write past the ends of their results.
    """
    folder = Path(__file__).parents[1] / "build" / "inductor" / torch.backends.cpu.get_cpu_capability()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # importing PyTorch has named one already


@dataclass(frozen=True)
class Implementation:
    """`attend(query, memory, method, *, need_weights, **parameters)` -> context, weights.

    `active` surrounds its calls, untimed. `methods`: those it has scores for. `tanh_copies`: tensors of size
    [B, T, S, A] that additive scores make it hold at once, forward and with backward.
    """

    name: str
    attend: Callable[..., Results]
    active: Callable[[], AbstractContextManager[object]] = nullcontext
    methods: tuple[str, ...] = (*METHODS, "additive")
    returns_weights: bool = True
    is_compiled: bool = False
    compile_mode: str = "default"
    tanh_copies: tuple[int, int] = (0, 0)

    def accepts(self, method: str, need_weights: bool) -> bool:
        """Whether it returns the same results as the fused op."""
        return method in self.methods and (self.returns_weights or not need_weights)

    def peak_bytes(self, method: str, shape: Shape, direction: str, itemsize: int = 4) -> int:
        """What its intermediates need at once, about."""
        with_backward = direction != "forward"
        scores = (4 if with_backward else 2) * shape.B * shape.T * shape.S
        tanh = self.tanh_copies[with_backward] * shape.elements if method in ("additive", "concat") else 0
        return (scores + tanh) * itemsize


def _public(query: Tensor, memory: Tensor, method: str, **parameters: Tensor | bool) -> Results:
    if method == "additive":
        return attn_ext.additive_attention(query, parameters.pop("keys"), parameters.pop("v"), memory, **parameters)
    return attn_ext.luong_attention(query, memory, method, **parameters)


def project(
    query: Tensor,
    memory: Tensor,
    method: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What meets the memory or its keys, and the keys where they are not the memory itself."""
    if method == "general":
        return F.linear(query, weight), None
    if method == "concat":
        query_weight, key_weight = weight.chunk(2, dim=1)
        return F.linear(query, query_weight), F.linear(memory, key_weight, bias)
    return query, keys


def eager(
    query: Tensor,
    memory: Tensor,
    method: str,
    *,
    need_weights: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
    v: Tensor | None = None,
    sum_of_products: bool = False,
) -> Results:
    """The best-written form; `sum_of_products` is what torch.compile can fuse into one loop."""
    query, keys = project(query, memory, method, weight, bias, keys)
    if keys is None:
        scores = torch.bmm(query, memory.transpose(1, 2))  # [B, T, S]
    else:
        hidden = torch.tanh(query[:, :, None] + keys[:, None])  # [B, T, S, A]
        scores = (hidden * v).sum(-1) if sum_of_products else hidden @ v
    weights = torch.softmax(scores, dim=-1)
    return torch.bmm(weights, memory), weights if need_weights else None


def sdpa(
    query: Tensor, memory: Tensor, method: str, *, need_weights: bool = False, weight: Tensor | None = None
) -> Results:
    query, _ = project(query, memory, method, weight)
    memory = memory.unsqueeze(1)  # one head
    return F.scaled_dot_product_attention(query.unsqueeze(1), memory, memory, scale=1.0).squeeze(1), None


def by_step(step: Callable[[Tensor], tuple[Tensor, Tensor]], query: Tensor, need_weights: bool) -> Results:
    """One query after the other, as a decoder asks: `step(query [B, 1, H])` -> context [B, 1, H], weights [B, 1, S]."""
    contexts, weights = zip(*(step(each) for each in query.split(1, dim=1)), strict=True)
    return torch.cat(contexts, dim=1), torch.cat(weights, dim=1) if need_weights else None


def _tutorial(
    query: Tensor,
    memory: Tensor,
    method: str,
    *,
    need_weights: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
) -> Results:
    """As tutorials on translators and chatbots write it: step by step, memory projected anew in each."""

    def step(hidden: Tensor) -> tuple[Tensor, Tensor]:
        if method == "dot":
            energy = hidden * memory
        elif method == "general":
            energy = hidden * F.linear(memory, weight.t())
        else:
            both = torch.cat((hidden.expand_as(memory), memory), dim=-1)  # [B, S, 2H]
            energy = v * torch.tanh(F.linear(both, weight, bias))
        weights = torch.softmax(energy.sum(-1), dim=-1).unsqueeze(1)  # [B, 1, S]
        return torch.bmm(weights, memory), weights

    return by_step(step, query, need_weights)


FUSED = Implementation("fused", _public, partial(attn_ext.use_backend, "fused"))
REFERENCE = Implementation("reference", _public, partial(attn_ext.use_backend, "reference"), tanh_copies=(2, 3))
EAGER = Implementation("eager", eager, tanh_copies=(2, 3))
TUTORIAL = Implementation("tutorial", _tutorial, methods=METHODS, tanh_copies=(4, 5))
SDPA = Implementation("SDPA", sdpa, methods=("dot", "general"), returns_weights=False)
SDPA_BACKENDS = tuple(
    replace(SDPA, name=f"SDPA {name}", active=partial(sdpa_kernel, backend))
    for name, backend in {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}.items()
)
COMPILED = Implementation("compiled", partial(eager, sum_of_products=True), is_compiled=True, tanh_copies=(0, 2))
AUTOTUNED = replace(COMPILED, name="autotuned", compile_mode="max-autotune")


@dataclass(frozen=True)
class Problem:
    """Inputs and the context's gradient, shared by all who solve it: the same for everybody, with scores of order 1."""

    method: str
    shape: Shape
    dtype: torch.dtype = torch.float32

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Leaves, by their names in `attend`."""
        generator = torch.Generator().manual_seed(0)
        B, T, S, H = self.shape.sizes

        def normal(*size: int, spread: float = 1.0) -> Tensor:
            return torch.randn(size, generator=generator).mul_(spread).to(self.dtype)

        tensors = {"query": normal(B, T, H, spread=H**-0.5), "memory": normal(B, S, H)}
        if self.method == "general":
            tensors["weight"] = normal(H, H, spread=H**-0.5)
        elif self.method == "concat":
            tensors |= {"weight": normal(H, 2 * H, spread=H**-0.5), "v": normal(H, spread=H**-0.5), "bias": normal(H)}
        elif self.method == "additive":
            tensors = {"query": normal(B, T, H), "memory": tensors["memory"], "keys": normal(B, S, H)}
            tensors["v"] = normal(H, spread=H**-0.5)
        return tensors

    @cached_property
    def grad_context(self) -> Tensor:
        """[B, T, H]"""
        B, T, _, H = self.shape.sizes
        return torch.randn(B, T, H, generator=torch.Generator().manual_seed(1)).to(self.dtype)


class Call:
    """One implementation on one problem in one direction: calling it does the work once and returns all it computed.

    "backward" is the pass through a graph that is kept from call to call. With `copies` of the inputs, the calls take
    turns with them, so that none finds its own in a cache.
    """

    def __init__(
        self,
        implementation: Implementation,
        problem: Problem,
        direction: str,
        need_weights: bool = True,
        name: str | None = None,
        copies: int = 1,
    ) -> None:
        self.name = name or implementation.name
        self.active = implementation.active
        self.direction = direction
        attend = implementation.attend
        if implementation.is_compiled:
            keep_compiled_apart()
            torch._dynamo.reset()  # the guards of other shapes would be tried before this one's
            attend = torch.compile(attend, dynamic=False, mode=implementation.compile_mode)
        self._attend = partial(attend, method=problem.method, need_weights=need_weights)
        requires_grad = direction != "forward"
        # Views, so that a problem's tensors serve calls with and without gradients.
        views = {name: x.detach().requires_grad_(requires_grad) for name, x in problem.inputs.items()}
        clones = [
            {name: x.detach().clone().requires_grad_(requires_grad) for name, x in views.items()}
            for _ in range(copies - 1)
        ]
        self._inputs = cycle([views, *clones])
        self._grad_context = problem.grad_context if requires_grad else None
        self._kept: tuple[dict[str, Tensor], Results] | None = None
        if implementation.is_compiled:
            self()  # compiles

    def __call__(self) -> tuple[Tensor | None, ...]:
        if self.direction == "backward":
            if self._kept is None:
                inputs = next(self._inputs)
                self._kept = inputs, self._attend(**inputs)
            inputs, (context, _) = self._kept
            return self._gradients(inputs, context, retain_graph=True)
        inputs = next(self._inputs)
        context, weights = self._attend(**inputs)
        if self.direction == "forward":
            return context, weights
        return context, weights, *self._gradients(inputs, context)

    def _gradients(self, inputs: dict[str, Tensor], context: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(context, tuple(inputs.values()), self._grad_context, retain_graph=retain_graph)
