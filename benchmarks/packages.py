"""The attention layers of packages that people install, as implementations (`make peers` installs them).

A layer runs as its package wrote it, and as the package's own decoders call it: all queries at once, or step by step.
Only what it would compute beyond attention is replaced, so that it is timed at its best; what cannot be is said below.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from benchmarks.implementations import METHODS, Implementation, Results, by_step, project


def load() -> tuple[tuple[Implementation, ...], dict[str, str]]:
    """The peers that are installed; and of those that cannot be timed, by name, why."""
    found: list[Implementation] = []
    absent: dict[str, str] = {}
    for name, (package, build) in PEERS.items():
        if find_spec(package) is None:
            absent[name] = f"{package} is not installed (make peers)"
            continue
        try:
            found.append(build(name))
        except Exception as error:  # an import may raise anything
            absent[name] = f"{package} cannot be imported: {error}"
    return tuple(found), absent


def _opennmt(name: str) -> Implementation:
    """GlobalAttention, all queries at once. Beyond attention it concatenates context and query."""
    package = _import("onmt.modules.global_attention")

    class Kept(nn.Module):
        """In place of the projection of [context, query]. The tanh behind it gets no elements."""

        def forward(self, both: Tensor) -> Kept:
            self.context = both[:, : both.shape[1] // 2]
            return self

        def view(self, *size: int) -> Tensor:
            return no_elements

    no_elements = torch.empty(0)

    @cache
    def layer(kind: str, size: int) -> nn.Module:
        attention = _without_parameters(package.GlobalAttention, size, attn_type=kind)
        attention.linear_out = Kept()
        return attention

    def attend(
        query: Tensor,
        memory: Tensor,
        method: str,
        *,
        need_weights: bool = True,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Results:
        size = query.shape[-1]
        attention = layer("mlp" if method == "concat" else method, size)
        if method == "general":
            attention.linear_in.weight = weight
        elif method == "concat":
            attention.linear_query.weight, attention.linear_context.weight = weight.chunk(2, dim=1)
            attention.linear_query.bias = bias
            attention.v.weight = v.unsqueeze(0)
        _, weights = attention(query, memory)
        context = attention.linear_out.context.view_as(query)
        attention.linear_out.context = None  # or it would keep the graph
        return context, weights if need_weights else None

    return Implementation(name, attend, methods=METHODS, tanh_copies=(2, 3))


def _joeynmt(name: str) -> Implementation:
    """LuongAttention and BahdanauAttention, step by step, the keys projected once. They ask for a mask and apply it."""
    package = _import("joeynmt.attention")

    @cache
    def layer(method: str, size: int) -> nn.Module:
        if method == "general":
            return _without_parameters(package.LuongAttention, size, size)
        return _without_parameters(package.BahdanauAttention, size, size, size)

    def attend(
        query: Tensor,
        memory: Tensor,
        method: str,
        *,
        need_weights: bool = True,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Results:
        B, S, size = memory.shape
        attention = layer(method, size)
        if method == "general":
            attention.key_layer.weight = weight.t()  # it projects the keys, not the query
        else:
            attention.query_layer.weight, attention.key_layer.weight = weight.chunk(2, dim=1)
            attention.key_layer.bias = bias
            attention.energy_layer.weight = v.unsqueeze(0)
        attention.compute_proj_keys(memory)
        mask = torch.ones(B, 1, S, dtype=torch.bool, device=memory.device)
        results = by_step(lambda each: attention(each, mask, memory), query, need_weights)
        attention.proj_keys = attention.proj_query = None  # or they would keep the graph
        return results

    return Implementation(name, attend, methods=("general", "concat"), tanh_copies=(2, 3))


def _speechbrain(name: str) -> Implementation:
    """ContentBasedAttention, step by step, the keys projected once. It also masks and scales."""
    package = _import(
        "speechbrain.nnet.attention",
        # Sound files and the log's settings: their imports are not installed, and nothing here calls them.
        unused=("speechbrain.dataio.audio_io", "speechbrain.utils.torch_audio_backend", "yaml"),
    )

    @cache
    def layer(size: int) -> nn.Module:
        attention = _without_parameters(package.ContentBasedAttention, size, size, size, size)
        attention.mlp_out = nn.Identity()
        return attention

    def attend(
        query: Tensor,
        memory: Tensor,
        method: str,
        *,
        need_weights: bool = True,
        weight: Tensor,
        bias: Tensor,
        v: Tensor,
    ) -> Results:
        B, S, size = memory.shape
        attention = layer(size)
        attention.mlp_dec.weight, attention.mlp_enc.weight = weight.chunk(2, dim=1)
        attention.mlp_enc.bias = bias
        attention.mlp_attn.weight = v.unsqueeze(0)
        lengths = torch.full((B,), S, device=memory.device)

        def step(each: Tensor) -> tuple[Tensor, Tensor]:
            context, weights = attention(memory, lengths, each.squeeze(1))
            return context.unsqueeze(1), weights.unsqueeze(1)

        results = by_step(step, query, need_weights)
        attention.reset()  # its keys are of this memory
        return results

    return Implementation(name, attend, methods=("concat",), tanh_copies=(2, 3))


def _keras(name: str) -> Implementation:
    """Attention and AdditiveAttention, all queries at once. They have no projections: those are done as in eager."""
    # Nothing of the user's own settings; and on the CPU, where its default would be a GPU.
    with tempfile.TemporaryDirectory() as home:
        settings = {"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cpu", "KERAS_HOME": home}
        with patch.dict(os.environ, settings):
            keras = import_module("keras")
    if keras.backend.backend() != "torch":
        raise ImportError(f"it has already been imported with {keras.backend.backend()}")

    @cache
    def layer(kind: str, size: int, dtype: torch.dtype) -> nn.Module:
        attention = getattr(keras.layers, kind)(dtype=str(dtype).removeprefix("torch."))
        attention.build([(None, None, size)] * 3)
        return attention

    def attend(
        query: Tensor,
        memory: Tensor,
        method: str,
        *,
        need_weights: bool = True,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        keys: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Results:
        size = query.shape[-1]
        query, keys = project(query, memory, method, weight, bias, keys)
        if keys is None:
            results = layer("Attention", size, query.dtype)([query, memory], return_attention_scores=need_weights)
        else:
            attention = layer("AdditiveAttention", size, query.dtype)
            attention.scale = v
            results = attention([query, memory, keys], return_attention_scores=need_weights)
        return results if need_weights else (results, None)

    return Implementation(name, attend, tanh_copies=(2, 5))


PEERS: dict[str, tuple[str, Callable[[str], Implementation]]] = {  # by name: what it is imported as
    "OpenNMT-py": ("onmt", _opennmt),
    "JoeyNMT": ("joeynmt", _joeynmt),
    "SpeechBrain": ("speechbrain", _speechbrain),
    "Keras": ("keras", _keras),
}


def _without_parameters(layer: Callable[..., nn.Module], *arguments: object, **options: object) -> nn.Module:
    """Its linear layers' weights and biases are plain attributes, None, that take the tensors of a call.

    So gradients reach those. torch.func.functional_call would see to that too, for 50 us a call: as long as a small
    attention takes.
    """
    with torch.device("meta"):  # no memory, and no random numbers
        module = layer(*arguments, **options)
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            del linear.weight, linear.bias
            linear.weight = linear.bias = None
    return module


class _BarePackages:
    """Finds a distribution's packages as bare folders: their own __init__ would import what is not installed."""

    def __init__(self, distribution: str) -> None:
        self._distribution = distribution

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self._distribution:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.submodule_search_locations is not None:
            spec.loader = None
        return spec


@contextmanager
def _alone(distribution: str, unused: tuple[str, ...]) -> Iterator[None]:
    """Nothing that is imported here of `distribution` stays in sys.modules, where it would pass for the whole."""
    before = set(sys.modules)
    finder = _BarePackages(distribution)
    sys.meta_path.insert(0, finder)
    sys.modules.update((name, MagicMock()) for name in unused if name not in before)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == distribution or name in unused:
                del sys.modules[name]


def _import(name: str, unused: tuple[str, ...] = ()) -> ModuleType:
    """The module without the rest of its distribution; `unused` are modules that it imports and does not need."""
    with _alone(name.partition(".")[0], unused), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # theirs
        return import_module(name)
