"""LuongAttention and Attention: parameters, and the numbers of formulas that are not the library's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_ext
from attn_ext import Attention, LuongAttention
from tests import cases

B, T, S, DQ, DM, A = 3, 5, 7, 8, 12, 10
MODULES: dict[str, dict[str, Any]] = {
    "dot": {"hidden_size": DQ},
    "general": {"hidden_size": DQ, "memory_size": DM},
    "concat": {"hidden_size": DQ, "memory_size": DM, "attention_size": A},
    "concat with bias": {"hidden_size": DQ, "memory_size": DM, "attention_size": A, "bias": True, "scale": 0.5},
}


def build(name: str, **options: Any) -> LuongAttention:
    torch.manual_seed(0)
    return LuongAttention(name.split()[0], **MODULES[name] | options)


def inputs(module: LuongAttention, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (B, T, module.hidden_size), (B, S, module.memory_size)
    hidden, encoder_outputs = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    return hidden, encoder_outputs


def formula(module: LuongAttention, hidden: Tensor, encoder_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Luong 2015, eq. 7 and 8, in the words of the paper."""
    if module.method == "dot":
        scores = torch.einsum("bth,bsh->bts", hidden, encoder_outputs)
    elif module.method == "general":
        scores = torch.einsum("bth,bsm,mh->bts", hidden, encoder_outputs, module.Wa.weight)
    else:
        pairs = torch.cat(
            (
                hidden.unsqueeze(2).expand(-1, -1, encoder_outputs.shape[1], -1),
                encoder_outputs.unsqueeze(1).expand(-1, hidden.shape[1], -1, -1),
            ),
            dim=-1,
        )
        scores = torch.tanh(module.Wa(pairs)) @ module.Va
    weights = torch.softmax(scores * module.scale, dim=-1)
    return weights @ encoder_outputs, weights


@pytest.mark.parametrize("name", MODULES)
def test_parameters(name: str) -> None:
    expected = {
        "dot": {},
        "general": {"Wa.weight": [DM, DQ]},
        "concat": {"Va": [A], "Wa.weight": [A, DQ + DM]},
        "concat with bias": {"Va": [A], "Wa.weight": [A, DQ + DM], "Wa.bias": [A]},
    }
    module = build(name)
    assert {n: list(p.shape) for n, p in module.named_parameters()} == expected[name]
    assert list(module.state_dict()) == list(expected[name])
    assert module.Wa is None or isinstance(module.Wa, nn.Linear)
    assert module.Va is None or name.startswith("concat")


def test_default_sizes() -> None:
    module = LuongAttention("concat", 6)
    assert (module.memory_size, module.attention_size) == (6, 6)
    assert LuongAttention("general", 6).attention_size is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_in_dtype(dtype: torch.dtype) -> None:
    module = build("concat with bias", dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    context, weights = module(*inputs(module, dtype))
    assert context.dtype == weights.dtype == dtype


def test_parameters_on_meta_device() -> None:
    assert all(p.is_meta for p in build("concat with bias", device="meta").parameters())


def test_initialisation() -> None:
    """nn.Linear's own: uniform in +-1/sqrt(fan in), Va's being A."""
    module = LuongAttention("concat", 100, attention_size=400)
    assert 0.04 < module.Va.abs().max() <= 1 / 400**0.5
    before = module.Va.clone()
    module.reset_parameters()
    assert not torch.equal(module.Va, before)


@pytest.mark.parametrize("name", MODULES)
def test_formula(name: str, each_backend: str) -> None:
    """Values and every gradient, in float64."""
    module = build(name, dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in inputs(module, torch.float64)]
    differentiated = [*tensors, *module.parameters()]
    results = []
    for attend in (module, lambda *pair: formula(module, *pair)):
        context, weights = attend(*tensors)
        grads = torch.autograd.grad(context.sin().sum() + weights.square().sum(), differentiated)
        results.append([context, weights, *grads])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", MODULES)
def test_is_the_functional_form(name: str) -> None:
    module = build(name)
    hidden, encoder_outputs = inputs(module)
    parameters = {"weight": module.Wa and module.Wa.weight, "v": module.Va, "bias": module.Wa and module.Wa.bias}
    masking = {"lengths": torch.tensor([S, 0, 3]), "mask": torch.rand(B, T, S) < 0.6}
    expected = attn_ext.luong_attention(
        hidden, encoder_outputs, module.method, **parameters, **masking, scale=module.scale
    )
    assert all(map(torch.equal, module(hidden, encoder_outputs, **masking), expected))
    context, weights = module(hidden, encoder_outputs, **masking, need_weights=False)
    assert weights is None
    torch.testing.assert_close(context, expected[0])


@pytest.mark.parametrize("name", MODULES)
def test_state_dict(name: str) -> None:
    module, other = build(name), LuongAttention(name.split()[0], **MODULES[name])
    other.load_state_dict(module.state_dict())
    for loaded in (other, copy.deepcopy(module)):
        assert all(map(torch.equal, loaded(*inputs(module)), module(*inputs(module))))


@pytest.mark.parametrize("batch", [1, 2, B, 9])
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_classic_interface(method: str, batch: int, each_backend: str) -> None:
    """hidden [1, B, H], encoder_outputs [B, S, H] -> weights [B, 1, S], for any batch, whatever batch_size said."""
    torch.manual_seed(0)
    module = Attention(method, B, DQ)
    hidden, encoder_outputs = torch.randn(1, batch, DQ), torch.randn(batch, S, DQ)
    weights = module(hidden, encoder_outputs)
    assert weights.shape == (batch, 1, S)
    torch.testing.assert_close(weights, formula(module, hidden.transpose(0, 1), encoder_outputs)[1])
    assert {n: list(p.shape) for n, p in module.named_parameters()} == {
        "dot": {},
        "general": {"Wa.weight": [DQ, DQ]},
        "concat": {"Va": [DQ], "Wa.weight": [DQ, 2 * DQ]},
    }[method]


def test_classic_interface_under_autocast(each_backend: str) -> None:
    """A bfloat16 hidden state meets float32 encoder outputs, as in LuongAttention."""
    module = Attention("general", B, DQ)
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        weights = module(torch.randn(1, B, DQ).bfloat16(), torch.randn(B, S, DQ))
    assert weights.dtype == torch.bfloat16


def test_repr() -> None:
    assert "'general', hidden_size=8, memory_size=12" in repr(build("general"))
    assert "'concat', hidden_size=8, memory_size=12, attention_size=10\n" in repr(build("concat"))
    assert "attention_size=10, scale=0.5\n" in repr(build("concat with bias"))


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_a_memory_of_another_module(method: str, each_backend: str) -> None:
    """Its parameters would be attended with, and trained, unnoticed. A copy of a memory may be attended by any."""
    module, other = attn_ext.LuongAttention(method, 4), attn_ext.LuongAttention(method, 4)
    hidden, encoder_outputs = torch.randn(2, 4), torch.randn(2, 5, 4)
    text = "^LuongAttention: encoder_outputs is an AttentionMemory that another module made"
    for made_by in (other, copy.deepcopy(module)):
        with pytest.raises(ValueError, match=text):
            module(hidden, made_by.memory(encoder_outputs))
    expected, _ = module(hidden, encoder_outputs)
    with torch.no_grad():
        memory = module.memory(encoder_outputs)
    for mine in (memory, pickle.loads(pickle.dumps(memory)), copy.deepcopy(memory)):
        torch.testing.assert_close(module(hidden, mine)[0], expected)
    by_hand = attn_ext.AttentionMemory(encoder_outputs, method, **module._parameters_of_method())
    torch.testing.assert_close(module(hidden, by_hand)[0], expected)
