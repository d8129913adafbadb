"""AttentionMemory: what the decoder steps of one batch share, prepared once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attn_ext import autocast, backend, checks, functional, reference

_OPS = torch.ops.attn_ext

# A call with more queries is no step of a loop: its gradients, all taken at once, are cheaper than deferred.
_MOST_QUERIES = 16


def _is_short(query: Tensor) -> bool:
    return query.dim() == 2 or query.shape[1] <= _MOST_QUERIES


def _require_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _unwrapped(tensor: Tensor | None) -> Tensor | None:
    """What lies within a transform's tensor, which says of itself that it requires no gradient."""
    while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class AttentionMemory:
    """The encoder outputs of one batch with everything that does not change from step to step.

    ::

        memory = attn.memory(encoder_outputs, lengths)       # once per batch
        for t in range(steps):
            context, weights = attn(hidden, memory)          # each decoder step

    What the steps share is prepared here, once: concat's keys and their exponentials. And it is paid for once: a step's
    backward takes the gradient of its query alone, and that of the memory, of `weight`, `v` and `bias` is taken when
    all steps' are over, in one matrix product for each. So the steps have no second derivative, which raises; that of
    :func:`attn_ext.luong_attention` with the encoder outputs themselves has one. For the same reason a memory that
    takes part in an autograd graph can be neither copied nor pickled.

    Where any of what it is made of requires a gradient, the memory is one node of the graph that all its steps hang on:
    of several backwards over them, all but the last need retain_graph=True, or each needs a memory of its own, as the
    chunks of truncated backpropagation and steps in reentrant checkpoints do. A gradient that is asked for after it is
    made, by requires_grad_(), is refused. Made under torch.no_grad() it has no node, and its keys have no part in the
    gradients of concat's parameters, nor in the memory's.

    The beams of a beam search are queries of one memory: [B, K, Dq] for K hypotheses a sentence.

    Under torch.autocast it is made of autocast's dtype; made before that, it keeps its own, and queries are cast to it.

    Args:
        memory: [B, S, Dm] encoder outputs.
        method, weight, v, bias, lengths, mask, scale: as in :func:`attn_ext.luong_attention`. None may be changed in
            place while the memory is in use: what was hidden when it was made has no keys.

    Attributes:
        memory, weight, v, lengths, mask: as given; memory, weight and v in autocast's dtype where that was enabled,
            lengths as int64 on memory's device. None where there is none.
        method: "dot", "general" or "concat".
        scale: as a float; 1.0 where none was given.
        keys: concat's, Wm memory + bias with [Wq Wm] = weight, [B, S, A]; rows that no query may attend hold anything,
            and so has a gradient given to them no meaning. A loss may be made of them, but their own gradient, as hooks
            and torch.autograd.grad see it, has nothing of the steps, which pass it on to the memory. None otherwise.

    Raises:
        ValueError, TypeError: as :func:`attn_ext.luong_attention`.
    """

    def __init__(
        self,
        memory: Tensor,
        method: str = "dot",
        *,
        weight: Tensor | None = None,
        v: Tensor | None = None,
        bias: Tensor | None = None,
        lengths: Tensor | Collection[int] | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        given = {"the memory": memory, "its weight": weight, "its v": v, "its bias": bias}
        memory, weight, v, bias = cast = autocast.cast(memory, weight, v, bias)
        self._is_cast = memory is not given["the memory"]
        self._maker: object = None
        arguments = checks.Arguments("AttentionMemory")
        arguments.came_from_autocast(tuple(given.values()), cast)
        functional.check_memory(arguments, memory, method, weight, v, bias)
        self.memory = memory
        self.method = method
        self.weight = weight
        self.v = v
        self.lengths = arguments.lengths(lengths)
        arguments.mask(mask)
        self.mask = mask
        self.scale = arguments.scale(scale)
        # What it takes for granted has no gradient, by name: as given, not what autocast has made of it.
        self._constants = {
            name: tensor
            for name, tensor in given.items()
            if torch.is_grad_enabled() and tensor is not None and not tensor.requires_grad
        }
        with autocast.disabled(memory):
            self._prepare(bias)

    def _prepare(self, bias: Tensor | None) -> None:
        """The keys, and what the ops for a loop's steps take besides: all of it made of the attributes above."""
        memory, weight, v = self.memory, self.weight, self.v
        is_grad_enabled = torch.is_grad_enabled()
        self._is_in_graph = is_grad_enabled and _require_grad(memory, weight, v, bias)
        self.keys: Tensor | None = None
        self._query_weight: Tensor | None = None
        self._prepared_keys: Tensor | None = None
        self._node: Tensor | None = None
        is_fused = backend.fused_runs_on(memory.device.type)
        self._is_prepared = is_fused and not is_compiling()
        if not is_fused:
            if weight is not None and v is not None:
                _, key_weight = reference.split_weight(weight, memory)
                self.keys = reference.project_keys(memory, key_weight, bias, self.lengths, self.mask)
            return
        if weight is not None:
            weight, bias = functional.of_products(memory, weight, bias)
            factors = weight.detach()  # a step hangs on the node, which has its gradient
            self._query_weight = factors if v is None else reference.split_weight(factors, memory)[0]
        # A subclass would have an alias of the node, which no step could hang on.
        with functional.transforms_explained(), torch._C.DisableTorchFunctionSubclass():
            node, keys, prepared_keys = _OPS.memory_node.default(memory, weight, v, bias, self.lengths, self.mask)
            is_blind = is_grad_enabled and not self._is_in_graph and not is_compiling()
            if is_blind and _require_grad(*map(_unwrapped, (memory, weight, v, bias))):
                raise RuntimeError(functional.NO_TRANSFORMS)  # there would be no node, and so no gradient
        if self._is_in_graph:
            self._node = node
        if v is not None:
            self.keys = keys
            self._prepared_keys = prepared_keys if prepared_keys.numel() else None

    def attend(self, query: Tensor, *, need_weights: bool = True) -> tuple[Tensor, Tensor | None]:
        """:func:`attn_ext.luong_attention` of `query` [B, T, Dq] or [B, Dq] over this memory."""
        return self._attend_for("AttentionMemory", "query", query, need_weights)

    def _attend_for(self, caller: str, name: str, query: Tensor, need_weights: bool) -> functional.Attended:
        """The same, for a `caller` whose argument `name` the query is."""
        try:
            if functional.goes_unchecked(query, self.memory) and type(need_weights) is bool and self._is_step(query):
                return self._attend_step(backend.calls.memory_attention, query, need_weights)
        except functional.REFUSALS:
            pass  # the checks find better words
        query = autocast.like(query, self.memory)
        with autocast.disabled(query):  # the memory is what it was made, wherever that was
            return self._attend_checked(caller, name, query, need_weights)

    def _attend_checked(self, caller: str, name: str, query: Tensor, need_weights: bool) -> functional.Attended:
        arguments = checks.Arguments(caller)
        functional.check_query(arguments, query, name=name)
        self._check(arguments, "the memory", "B S Dq" if self.method == "dot" else "B S Dm")
        if self.method == "general":
            arguments.floating("weight", self.weight, "Dm Dq")
        elif self.method == "concat":
            arguments.bind("Dq+Dm", arguments.sizes["Dq"] + arguments.sizes["Dm"], f"{name} and the memory")
            arguments.floating("weight", self.weight, "A Dq+Dm")
        arguments.mask(self.mask)
        arguments.flag("need_weights", need_weights)
        self._check_gradients(arguments)
        if not is_compiling() and backend.fused_runs_on(query.device.type) and self._is_step(query):
            with functional.transforms_explained():
                context, weights = self._attend_step(_OPS.memory_attention.default, query, need_weights)
            return context, weights if need_weights else None
        weight = self.weight
        if weight is not None and self.keys is not None:
            query_weight, _ = reference.split_weight(weight, self.memory)
            query, weight = functional.linear(query, query_weight), None
        return functional.attend(
            query,
            self.memory,
            self.keys,
            self.v,
            lengths=self.lengths,
            mask=self.mask,
            scale=self.scale,
            need_weights=need_weights,
            weight=weight,
        )

    def _check(self, arguments: checks.Arguments, name: str, dims: str) -> None:
        """The memory against a call's other arguments, which name it `name`."""
        if self._is_cast:
            arguments.came_from_autocast([None], [self.memory])
        arguments.floating(name, self.memory, dims)

    def _check_gradients(self, arguments: checks.Arguments) -> None:
        """ValueError where one would miss what went into the memory before it was asked for."""
        for name, tensor in self._constants.items():
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{arguments.caller}: {name} requires a gradient, which it did not when the AttentionMemory was "
                    "made; needed is one that is made after requires_grad_()"
                )

    def _check_maker(self, caller: str, name: str, maker: object) -> None:
        """ValueError where another module made it."""
        if not self._is_for(maker):
            raise ValueError(
                f"{caller}: {name} is an AttentionMemory that another module made, of its own parameters; "
                "needed is one that this module's memory() made, or the encoder outputs"
            )

    def _is_step(self, query: Tensor) -> bool:
        """Whether `query` goes to the ops for a loop's steps, which the memory is prepared for."""
        if not self._is_prepared:
            return False
        if torch.is_grad_enabled():
            if self._node is not None:
                return _is_short(query) and not (self._constants and _require_grad(*self._constants.values()))
            if _require_grad(query, self.memory, self.weight, self.v, self.keys, *self._constants.values()):
                return False
        # The steps' ops project the queries, of which there can be more than of the memory's rows.
        return (
            self.weight is None
            or self.v is not None
            or _is_short(query)
            or not functional.has_fewer_keys(query, self.memory, self.weight)
        )

    def _attend_step(
        self, memory_attention: Callable[..., functional.Attended], query: Tensor, need_weights: bool
    ) -> functional.Attended:
        return memory_attention(
            query,
            self._query_weight,
            self.memory,
            self.keys,
            self.v,
            self._prepared_keys,
            self.lengths,
            self.mask,
            self.scale,
            need_weights,
            self._node,
        )

    def _made_by(self, maker: object) -> AttentionMemory:
        """This memory, for the calls of `maker` alone: of another module's parameters nothing would come into them."""
        self._maker = maker
        return self

    def _is_for(self, maker: object) -> bool:
        return self._maker is None or self._maker is maker

    def _of_step(self, t: int) -> AttentionMemory:
        """This memory as step `t` of a loop attends it: under its own row of a mask [B, T, S]."""
        if self.mask is None or self.mask.dim() == 2:
            return self
        step = object.__new__(AttentionMemory)
        step.__dict__.update(self.__dict__)
        step.mask = self.mask[:, t : t + 1]
        return step

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maker": None}  # who holds a copy, knows what it is of

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        kept = (self.memory, self.keys, self.v, self.weight)
        if self._is_in_graph or any(tensor is not None and tensor.grad_fn is not None for tensor in kept):
            raise TypeError(
                "AttentionMemory: it takes part in an autograd graph and can be neither copied nor pickled; "
                "make another one from the encoder outputs, or make it under torch.no_grad() from detached ones"
            )
        return super().__reduce_ex__(protocol)

    def _refuse_second_opinion(self, caller: str, name: str, method: str, **overrides: object) -> None:
        """A call that brings its own method or parameters to a memory that has them is a mistake: ValueError."""
        checks.choice(caller, "method", method, functional.METHODS)
        if method not in ("dot", self.method):
            raise ValueError(f"{caller}: method is {method!r}, but {name} is an AttentionMemory for {self.method!r}")
        for override, value in overrides.items():
            if value is not None:
                raise ValueError(
                    f"{caller}: {name} is an AttentionMemory, which has its own {override}: "
                    f"{override} must be None here"
                )
