"""Wrong input: the error, and a text that names the argument, what came and what is needed; in each backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import Attention, AttentionMemory, LuongAttention, checks, functional
from tests.cases import Case, spoiled

B, T, S, DQ, DM, A = 2, 3, 5, 4, 6, 7
DEVICE = torch.zeros(()).device


def zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "dot": {"query": zeros(B, T, DQ), "memory": zeros(B, S, DQ)},
    "general": {"query": zeros(B, T, DQ), "memory": zeros(B, S, DM), "weight": zeros(DM, DQ)},
    "concat": {
        "query": zeros(B, T, DQ),
        "memory": zeros(B, S, DM),
        "weight": zeros(A, DQ + DM),
        "v": zeros(A),
        "bias": zeros(A),
    },
    "additive": {"query": zeros(B, T, A), "keys": zeros(B, S, A), "v": zeros(A), "values": zeros(B, S, DM)},
}
OPTIONS = {"lengths": torch.tensor([S, 1]), "mask": torch.ones(B, S, dtype=torch.bool), "scale": 1.0}


def luong(method: str = "dot", **changes: Any) -> object:
    return attn_ext.luong_attention(method=method, **ARGUMENTS.get(method, ARGUMENTS["dot"]) | changes)


def dot(**changes: Any) -> object:
    return attn_ext.dot_attention(**ARGUMENTS["dot"] | changes)


def additive(**changes: Any) -> object:
    return attn_ext.additive_attention(**ARGUMENTS["additive"] | changes)


def memory(method: str = "dot", **changes: Any) -> AttentionMemory:
    arguments = {name: value for name, value in ARGUMENTS[method].items() if name != "query"}
    return AttentionMemory(method=method, **arguments | changes)


def stepwise(method: str, of: str = "dot", **arguments: Any) -> object:
    return attn_ext.luong_attention(zeros(B, DQ), memory(of), method, **arguments)


double = partial(torch.zeros, dtype=torch.float64)
integers = partial(torch.zeros, dtype=torch.int64)
sparse = zeros(B, T, DQ).to_sparse()
meta = partial(torch.zeros, device="meta")
mask = partial(torch.ones, dtype=torch.bool)

DTYPES = "torch.float32, torch.float64, torch.bfloat16, torch.float16"

# call, error, its text
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    # what is no tensor
    (lambda: luong(query=[1.0]), TypeError, "luong_attention: query must be a torch.Tensor, got list"),
    (lambda: dot(memory=None), TypeError, "dot_attention: memory must be a torch.Tensor, got NoneType"),
    (lambda: additive(keys="k"), TypeError, "additive_attention: keys must be a torch.Tensor, got str"),
    (
        lambda: dot(query=sparse),
        TypeError,
        "dot_attention: query must be a dense (strided) tensor, got layout torch.sparse_coo",
    ),
    # dtypes
    (
        lambda: dot(query=integers(B, T, DQ)),
        TypeError,
        f"dot_attention: query is torch.int64; needed is one of {DTYPES}",
    ),
    (
        lambda: dot(memory=double(B, S, DQ)),
        TypeError,
        "dot_attention: memory is torch.float64, but query is torch.float32; they must be the same",
    ),
    (
        lambda: luong("concat", v=double(A)),
        TypeError,
        "luong_attention: v is torch.float64, but query is torch.float32; they must be the same",
    ),
    # devices
    (
        lambda: dot(memory=meta(B, S, DQ)),
        ValueError,
        f"dot_attention: memory is on meta, but query is on {DEVICE}; they must be on the same device",
    ),
    (
        lambda: dot(lengths=torch.tensor([1, 2]).to("meta")),
        ValueError,
        f"dot_attention: lengths is on meta, but query is on {DEVICE}; they must be on the same device",
    ),
    (
        lambda: dot(mask=mask(B, S, device="meta")),
        ValueError,
        f"dot_attention: mask is on meta, but query is on {DEVICE}; they must be on the same device",
    ),
    # shapes
    (
        lambda: luong(query=zeros(DQ)),
        ValueError,
        "luong_attention: query has shape [4], needed is [B, T, Dq], or [B, Dq] for one decoder step",
    ),
    (
        lambda: additive(query=zeros(1, B, T, A)),
        ValueError,
        "additive_attention: query has shape [1, 2, 3, 7], needed is [B, T, A], or [B, A] for one decoder step",
    ),
    (
        lambda: luong(memory=zeros(B, S, DM)),
        ValueError,
        "luong_attention: memory has shape [2, 5, 6], needed is [B, S, Dq] with B=2 (from query), Dq=4 (from query)",
    ),
    (
        lambda: luong("general", memory=zeros(B + 1, S, DM)),
        ValueError,
        "luong_attention: memory has shape [3, 5, 6], needed is [B, S, Dm] with B=2 (from query)",
    ),
    (
        lambda: dot(memory=zeros(B, DQ)),
        ValueError,
        "dot_attention: memory has shape [2, 4], needed is [B, S, Dq] with B=2 (from query), Dq=4 (from query)",
    ),
    (
        lambda: luong("general", weight=zeros(DQ, DM)),
        ValueError,
        "luong_attention: weight has shape [4, 6], needed is [Dm, Dq] with Dm=6 (from memory), Dq=4 (from query)",
    ),
    (
        lambda: luong("concat", weight=zeros(A, DQ)),
        ValueError,
        "luong_attention: weight has shape [7, 4], needed is [A, Dq+Dm] with Dq+Dm=10 (from query and memory)",
    ),
    (
        lambda: luong("concat", v=zeros(A + 1)),
        ValueError,
        "luong_attention: v has shape [8], needed is [A] with A=7 (from weight)",
    ),
    (
        lambda: luong("concat", bias=zeros(1, A)),
        ValueError,
        "luong_attention: bias has shape [1, 7], needed is [A] with A=7 (from weight)",
    ),
    (
        lambda: additive(keys=zeros(B, S, A + 1)),
        ValueError,
        "additive_attention: keys has shape [2, 5, 8], needed is [B, S, A] with B=2 (from query), A=7 (from query)",
    ),
    (
        lambda: additive(v=zeros(1)),
        ValueError,
        "additive_attention: v has shape [1], needed is [A] with A=7 (from query)",
    ),
    (
        lambda: additive(values=zeros(B, S + 1, DM)),
        ValueError,
        "additive_attention: values has shape [2, 6, 6], needed is [B, S, Dm] with B=2 (from query), S=5 (from keys)",
    ),
    # lengths
    (
        lambda: dot(lengths=3),
        TypeError,
        "dot_attention: lengths must be integers, [B], got int 3",
    ),
    (
        lambda: dot(lengths=[1, 2.0]),
        TypeError,
        "dot_attention: lengths must be integers, [B], got list [1, 2.0]",
    ),
    (
        lambda: dot(lengths=[True, 2]),
        TypeError,
        "dot_attention: lengths must be integers, [B], got list [True, 2]",
    ),
    (lambda: dot(lengths=zeros(B)), TypeError, "dot_attention: lengths must be integers, got torch.float32"),
    (lambda: dot(lengths=mask(B)), TypeError, "dot_attention: lengths must be integers, got torch.bool"),
    (
        lambda: dot(lengths=[1, 2, 3]),
        ValueError,
        "dot_attention: lengths has shape [3], needed is [B] with B=2 (from query)",
    ),
    (
        lambda: dot(lengths=[6, 2]),
        ValueError,
        "dot_attention: lengths go from 2 to 6, needed is 0 <= length <= S=5 (from memory)",
    ),
    (
        lambda: additive(lengths=torch.tensor([-1, 2], device="cpu")),
        ValueError,
        "additive_attention: lengths go from -1 to 2, needed is 0 <= length <= S=5 (from keys)",
    ),
    # masks
    (lambda: dot(mask=[[True]]), TypeError, "dot_attention: mask must be a torch.Tensor, got list"),
    (
        lambda: dot(mask=zeros(B, S)),
        TypeError,
        "dot_attention: mask must be torch.bool (True = may be attended), got torch.float32; "
        "additive float masks are not supported",
    ),
    (
        lambda: dot(mask=mask(S)),
        ValueError,
        "dot_attention: mask has shape [5], needed is [B, S] or [B, T, S] with B=2, T=3, S=5",
    ),
    (
        lambda: dot(mask=mask(B, T)),
        ValueError,
        "dot_attention: mask has shape [2, 3], needed is [B, S] with B=2 (from query), S=5 (from memory)",
    ),
    (
        lambda: dot(mask=mask(B, 1, S)),
        ValueError,
        "dot_attention: mask has shape [2, 1, 5], needed is [B, T, S] with "
        "B=2 (from query), T=3 (from query), S=5 (from memory)",
    ),
    (
        lambda: dot(query=zeros(B, DQ), mask=mask(B, T, S)),
        ValueError,
        "dot_attention: mask has shape [2, 3, 5], needed is [B, T, S] with "
        "B=2 (from query), T=1 (from query), S=5 (from memory)",
    ),
    # scale, need_weights
    (lambda: dot(scale="1"), TypeError, "dot_attention: scale must be a number or None, got str"),
    (lambda: dot(scale=float("nan")), ValueError, "dot_attention: scale is nan, needed is a finite number"),
    (lambda: dot(scale=10**400), ValueError, f"dot_attention: scale is {10**400}, needed is a finite number"),
    (lambda: dot(scale=True), TypeError, "dot_attention: scale must be a number or None, got bool"),
    (
        lambda: dot(scale=torch.tensor(1.0)),
        TypeError,
        "dot_attention: scale must be a number or None, got torch.Tensor",
    ),
    (lambda: dot(need_weights=1), TypeError, "dot_attention: need_weights must be True or False, got int"),
    # the method and what belongs to it
    (
        lambda: luong("dots"),
        ValueError,
        "luong_attention: method is 'dots', needed is one of 'dot', 'general', 'concat'",
    ),
    *(
        (
            lambda method=method: attn_ext.luong_attention(**ARGUMENTS["dot"], method=method),
            ValueError,
            f"luong_attention: method is {method!r}, needed is one of 'dot', 'general', 'concat'",
        )
        for method in (None, "additive", [])
    ),
    (
        lambda: additive(keys=None, v=None, values=zeros(B, S, A)),
        TypeError,
        "additive_attention: keys must be a torch.Tensor, got NoneType",
    ),
    (
        lambda: luong("general", weight=None),
        ValueError,
        "luong_attention: method='general' needs weight [Dm, Dq], got None",
    ),
    (
        lambda: luong("concat", weight=None),
        ValueError,
        "luong_attention: method='concat' needs weight [A, Dq + Dm], got None",
    ),
    (lambda: luong("concat", v=None), ValueError, "luong_attention: method='concat' needs v [A], got None"),
    (
        lambda: luong("dot", weight=zeros(DQ, DQ)),
        ValueError,
        "luong_attention: method='dot' has no weight, got one: it must be None",
    ),
    (
        lambda: luong("general", bias=zeros(DM)),
        ValueError,
        "luong_attention: method='general' has no bias, got one: it must be None",
    ),
    # AttentionMemory
    (lambda: memory(memory=[]), TypeError, "AttentionMemory: memory must be a torch.Tensor, got list"),
    (
        lambda: memory(lengths=[9, 0]),
        ValueError,
        "AttentionMemory: lengths go from 0 to 9, needed is 0 <= length <= S=5 (from memory)",
    ),
    (
        lambda: memory(mask=mask(B, S + 1)),
        ValueError,
        "AttentionMemory: mask has shape [2, 6], needed is [B, S] with B=2 (from memory), S=5 (from memory)",
    ),
    (
        lambda: memory(mask=mask(B, T, S)).attend(zeros(B, T + 1, DQ)),
        ValueError,
        "AttentionMemory: mask has shape [2, 3, 5], needed is [B, T, S] with "
        "B=2 (from query), T=4 (from query), S=5 (from the memory)",
    ),
    (
        lambda: memory().attend(zeros(B + 1, DQ)),
        ValueError,
        "AttentionMemory: the memory has shape [2, 5, 4], needed is [B, S, Dq] with "
        "B=3 (from query), Dq=4 (from query)",
    ),
    (
        lambda: memory("general").attend(zeros(B, DQ + 1)),
        ValueError,
        "AttentionMemory: weight has shape [6, 4], needed is [Dm, Dq] with Dm=6 (from the memory), Dq=5 (from query)",
    ),
    (
        lambda: memory("concat").attend(zeros(B, DQ + 1)),
        ValueError,
        "AttentionMemory: weight has shape [7, 10], needed is [A, Dq+Dm] with Dq+Dm=11 (from query and the memory)",
    ),
    (
        lambda: memory().attend(double(B, DQ)),
        TypeError,
        "AttentionMemory: the memory is torch.float32, but query is torch.float64; they must be the same",
    ),
    (
        lambda: stepwise("concat", of="general"),
        ValueError,
        "luong_attention: method is 'concat', but memory is an AttentionMemory for 'general'",
    ),
    (
        lambda: stepwise("dot", lengths=[1, 1]),
        ValueError,
        "luong_attention: memory is an AttentionMemory, which has its own lengths: lengths must be None here",
    ),
    *(
        (
            lambda name=name: stepwise("concat", of="concat", **{name: ARGUMENTS["concat"][name]}),
            ValueError,
            f"luong_attention: memory is an AttentionMemory, which has its own {name}: {name} must be None here",
        )
        for name in ("weight", "v", "bias")
    ),
    # modules
    (
        lambda: LuongAttention("dott", 4),
        ValueError,
        "LuongAttention: method is 'dott', needed is one of 'dot', 'general', 'concat'",
    ),
    (lambda: LuongAttention("dot", 0), ValueError, "LuongAttention: hidden_size is 0, needed is at least 1"),
    (lambda: LuongAttention("dot", 4.0), TypeError, "LuongAttention: hidden_size must be an integer, got float"),
    (
        lambda: LuongAttention("general", 4, -1),
        ValueError,
        "LuongAttention: memory_size is -1, needed is at least 1",
    ),
    (
        lambda: LuongAttention("concat", 4, attention_size="8"),
        TypeError,
        "LuongAttention: attention_size must be an integer, got str",
    ),
    (
        lambda: LuongAttention("dot", 4, 6),
        ValueError,
        "LuongAttention: method='dot' needs memory_size equal to hidden_size=4, got 6; 'general' and 'concat' take any",
    ),
    (
        lambda: LuongAttention("general", 4, attention_size=8),
        ValueError,
        "LuongAttention: attention_size is for method='concat', got 8 for 'general'",
    ),
    (
        lambda: LuongAttention("dot", 4, bias=True),
        ValueError,
        "LuongAttention: bias is for method='concat', got bias=True for 'dot'",
    ),
    (
        lambda: LuongAttention("concat", 4, bias="no"),
        TypeError,
        "LuongAttention: bias must be True or False, got str",
    ),
    (
        lambda: LuongAttention("concat", 4, dtype=torch.int64),
        TypeError,
        f"LuongAttention: dtype is torch.int64, needed is one of {DTYPES}, or None",
    ),
    (
        lambda: LuongAttention("dot", 4, device="nowhere"),
        ValueError,
        "LuongAttention: device is 'nowhere', needed is a torch.device, its name, or None",
    ),
    (
        lambda: LuongAttention("concat", 4, device=0.5),
        TypeError,
        "LuongAttention: device is 0.5, needed is a torch.device, its name, or None",
    ),
    (
        lambda: LuongAttention("general", DQ, dtype=torch.float16)(zeros(B, DQ), zeros(B, S, DQ)),
        TypeError,
        "LuongAttention: hidden is torch.float32, but Wa.weight is torch.float16; they must be the same",
    ),
    (lambda: LuongAttention("dot", True), TypeError, "LuongAttention: hidden_size must be an integer, got bool"),
    (lambda: LuongAttention("dot", 4, scale="1"), TypeError, "LuongAttention: scale must be a number or None, got str"),
    # Whether or not they fit each other and the parameters.
    *(
        (call, ValueError, f"LuongAttention: {text}")
        for call, text in (
            (
                lambda: LuongAttention("general", DQ, DM)(zeros(B, DQ), zeros(B, S, DQ)),
                "encoder_outputs has shape [2, 5, 4], needed is [B, S, Dm] with B=2 (from hidden), "
                "Dm=6 (from memory_size)",
            ),
            (
                lambda: LuongAttention("concat", DQ, DM)(zeros(B, T, DM), zeros(B, S, DQ)),
                "hidden has shape [2, 3, 6], needed is [B, T, Dq] with Dq=4 (from hidden_size)",
            ),
            (
                lambda: LuongAttention("dot", DQ)(zeros(B, DM), zeros(B, S, DM)),
                "hidden has shape [2, 6], needed is [B, Dq] with Dq=4 (from hidden_size)",
            ),
            (
                lambda: LuongAttention("dot", DQ)(zeros(B, DM), AttentionMemory(zeros(B, S, DM))),
                "hidden has shape [2, 6], needed is [B, Dq] with Dq=4 (from hidden_size)",
            ),
            (
                lambda: LuongAttention("concat", DQ, DM).memory(zeros(B, S, DQ)),
                "encoder_outputs has shape [2, 5, 4], needed is [B, S, Dm] with Dm=6 (from memory_size)",
            ),
            (
                lambda: LuongAttention("dot", DQ)(zeros(DQ), zeros()),
                "hidden has shape [4], needed is [B, T, Dq], or [B, Dq] for one decoder step",
            ),
        )
    ),
    (
        lambda: LuongAttention("dot", DQ)(zeros(B + 1, DQ), memory()),
        ValueError,
        "LuongAttention: the memory has shape [2, 5, 4], needed is [B, S, Dq] with B=3 (from hidden), "
        "Dq=4 (from hidden)",
    ),
    *(
        (
            lambda method=method: LuongAttention(method, DQ, DM, device="meta")(zeros(B, DQ), zeros(B, S, DM)),
            ValueError,
            f"LuongAttention: hidden is on {DEVICE}, but Wa.weight is on meta; they must be on the same device",
        )
        for method in ("general", "concat")
    ),
    (
        lambda: LuongAttention(torch.zeros(2), 4),
        ValueError,
        "LuongAttention: method is tensor([0., 0.]), needed is one of 'dot', 'general', 'concat'",
    ),
    (
        lambda: LuongAttention("dot", DQ)([1.0], zeros(B, S, DQ)),
        TypeError,
        "LuongAttention: hidden must be a torch.Tensor, got list",
    ),
    (
        lambda: LuongAttention("dot", DQ)(zeros(B, DQ), memory(), lengths=[1, 1]),
        ValueError,
        "LuongAttention: encoder_outputs is an AttentionMemory, which has its own lengths: lengths must be None here",
    ),
    (
        lambda: Attention("dot", B, DQ)(zeros(1, B, DM), zeros(B, S, DM)),
        ValueError,
        "Attention: hidden has shape [1, 2, 6], needed is [layers, B, H] with layers=1 (from the interface), "
        "H=4 (from hidden_size)",
    ),
    (lambda: Attention("dot", 0, 4), ValueError, "Attention: batch_size is 0, needed is at least 1"),
    (
        lambda: Attention("dot", B, DQ)(zeros(2, B, DQ), zeros(B, S, DQ)),
        ValueError,
        "Attention: hidden has shape [2, 2, 4], needed is [layers, B, H] with layers=1 (from the interface), "
        "H=4 (from hidden_size)",
    ),
    (
        lambda: Attention("dot", B, DQ)(zeros(1, B, DQ), zeros(B, S, DM)),
        ValueError,
        "Attention: encoder_outputs has shape [2, 5, 6], needed is [B, S, H] with B=2 (from hidden), "
        "H=4 (from hidden_size)",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_error(call: Callable[[], object], error: type[Exception], text: str, each_backend: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == text


def test_numbers_as_lengths_are_seen_on_the_cpu(each_backend: str) -> None:
    """Whatever device tensors are made on where none is named."""
    with torch.device("meta"), pytest.raises(ValueError, match="lengths go from 2 to 6, needed is 0 <= length <= S=5"):
        dot(lengths=[6, 2])


def test_lengths_as_a_parameter_are_checked(each_backend: str) -> None:
    lengths = torch.nn.Parameter(torch.tensor([9, -1], device="cpu"), requires_grad=False)
    with pytest.raises(ValueError, match="lengths go from -1 to 9, needed is 0 <= length <= S=5"):
        dot(lengths=lengths)


def test_what_autocast_made_is_said(each_backend: str) -> None:
    text = "memory is torch.bfloat16, as torch.autocast made it, but query is torch.float64; they must be the same"
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(TypeError, match=f"^dot_attention: {text}$"):
        dot(query=double(B, T, DQ))


def test_integers_of_numpy(each_backend: str) -> None:
    """They count as Python's; their bool and their floats do not."""
    numpy = pytest.importorskip("numpy")
    expected = dot(lengths=[3, 1])
    assert all(map(torch.equal, dot(lengths=[numpy.int64(3), numpy.uint8(1)]), expected))
    assert type(LuongAttention("concat", numpy.int32(4)).hidden_size) is int
    for kind in ("int64", "int32", "uint8"):
        assert all(map(torch.equal, dot(lengths=numpy.array([3, 1], dtype=kind)), expected))
    for array in (numpy.array([3.0, 1.0]), numpy.array([True, False]), numpy.array(3), numpy.array([[3], [1]])):
        with pytest.raises(TypeError, match=r"lengths must be integers, \[B\], got ndarray array"):
            dot(lengths=array)
    for wrong in (numpy.bool_(True), numpy.float32(1)):
        with pytest.raises(TypeError, match="lengths must be integers"):
            dot(lengths=[wrong, 1])
        with pytest.raises(TypeError, match="hidden_size must be an integer"):
            LuongAttention("dot", wrong)


CALLS = {"luong_attention": partial(luong, "concat"), "dot_attention": dot, "additive_attention": additive}


@pytest.mark.parametrize("wrong", [object(), "text", 2 + 1j, [[object()]], {}], ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (name, argument)
        for name, method in zip(CALLS, ("concat", "dot", "additive"), strict=True)
        for argument in (*ARGUMENTS[method], *OPTIONS, "need_weights")
    ],
)
def test_wrong_type(function: str, argument: str, wrong: object, each_backend: str) -> None:
    with pytest.raises(TypeError, match=f"^{function}: {argument} "):
        CALLS[function](**{argument: wrong})


ODD_INPUT: dict[str, Callable[[], object]] = {
    "memory with a 1-D mask": lambda: memory(mask=mask(S)),
    "memory with a 4-D mask": lambda: memory(mask=mask(1, B, T, S)),
    "memory with a weight narrower than itself": lambda: memory("concat", weight=zeros(A, DM - 1)),
    "lengths beyond int64": lambda: dot(lengths=[2**70, 0]),
    "lengths too long in uint16": lambda: dot(lengths=torch.tensor([9, 1], dtype=torch.uint16, device="cpu")),
    "sparse lengths": lambda: dot(lengths=torch.tensor([1, 2]).to_sparse()),
    "no hidden size": lambda: LuongAttention("dot", None),
    "no batch size": lambda: Attention("dot", None, 4),
    "a general module's memory for a dot module": lambda: LuongAttention("dot", DQ)(zeros(B, DQ), memory("general")),
    "a dot module's memory for a general module": lambda: LuongAttention("general", DQ)(zeros(B, DQ), memory()),
}


@pytest.mark.parametrize("call", ODD_INPUT.values(), ids=ODD_INPUT)
def test_odd_input(call: Callable[[], object]) -> None:
    """What slips through one check meets another, and the text says who refused: no error from somewhere inside."""
    with pytest.raises((ValueError, TypeError), match=r"^(luong_attention|dot_attention|\w*Attention\w*): "):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "parameter"), [("general", "weight"), ("concat", "weight"), ("concat", "bias")])
def test_halves_with_a_float32_parameter(
    method: str, parameter: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, each_backend: str
) -> None:
    """Refused too where the processor's products are of float32, and would take them."""
    monkeypatch.setattr(functional, "_SLOW_ON_CPU", (torch.bfloat16, torch.float16))
    halves = {name: value.to(dtype) for name, value in ARGUMENTS[method].items()}
    text = f"^luong_attention: {parameter} is torch.float32, but query is {dtype}; they must be the same$"
    with pytest.raises(TypeError, match=text):
        luong(method, **halves | {parameter: ARGUMENTS[method][parameter]})


STEPS: dict[str, Callable[..., object]] = {
    "dot": attn_ext.dot_attention,
    "additive": attn_ext.additive_attention,
    "luong dot": attn_ext.luong_attention,
    "luong general": partial(attn_ext.luong_attention, method="general"),
    "luong concat": partial(attn_ext.luong_attention, method="concat"),
    **{
        f"memory {method}": lambda query, need_weights=True, method=method, **arguments: AttentionMemory(
            method=method, **arguments
        ).attend(query, need_weights=need_weights)
        for method in functional.METHODS
    },
}


def step_arguments(step: str, one_step: bool = False) -> dict[str, Any]:
    problem = Case(step.split()[-1], masking="lengths+pairs").problem()
    valid = problem.tensors | problem.options | {"scale": 0.5}
    return valid | {"query": valid["query"][:, 0], "mask": valid["mask"][:, :1]} if one_step else valid


def outcome(call: Callable[[], object]) -> str:
    try:
        return repr(call())
    except Exception as error:
        return repr(error)


@pytest.mark.fused
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("one_step", [False, True], ids=["[B, T, D]", "[B, D]"])
@pytest.mark.parametrize("step", STEPS)
def test_refused_with_and_without_the_checks_first(step: str, one_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with an argument: the ops refuse what the checks refuse, and theirs are the words."""
    valid = step_arguments(step, one_step)
    odd = [None, 0, 1, True, 2.0, float("inf"), "text", [1, 2], [9, 0], torch.tensor([1, 2], dtype=torch.int32)]
    odd.append(torch.nested.as_nested_tensor([zeros(T, DQ)]))
    calls = {
        f"{name} {what}": partial(STEPS[step], **valid | {name: wrong})
        for name, value in valid.items()
        for what, wrong in (*(spoiled(value) if isinstance(value, Tensor) else ()), *((repr(o)[:20], o) for o in odd))
    }
    outcomes = {what: outcome(call) for what, call in calls.items()}
    inside = [
        f"{what}: {text}" for what, text in outcomes.items() if not text.startswith(("(", "TypeError", "ValueError"))
    ]
    assert not inside, "no words of the checks"
    monkeypatch.setattr(functional, "goes_unchecked", lambda *_: False)
    assert outcomes == {what: outcome(call) for what, call in calls.items()}


@pytest.mark.fused
@pytest.mark.parametrize("one_step", [False, True], ids=["[B, T, D]", "[B, D]"])
@pytest.mark.parametrize("step", STEPS)
def test_a_valid_call_runs_no_checks(step: str, one_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be most of its time."""
    valid = step_arguments(step, one_step)
    if step.startswith("memory"):
        arguments = {name: value for name, value in valid.items() if name not in ("query", "need_weights")}
        memory = AttentionMemory(method=step.split()[-1], **arguments)
        call = partial(memory.attend, valid["query"])
    else:
        call = partial(STEPS[step], **valid)
    monkeypatch.setattr(checks, "Arguments", None)
    call()


@pytest.mark.parametrize("with_memory", [False, True])
def test_no_hidden_state_is_named(with_memory: bool, each_backend: str) -> None:
    attn, encoder_outputs = attn_ext.LuongAttention("general", 4), torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor, got NoneType"):
        attn(None, attn.memory(encoder_outputs) if with_memory else encoder_outputs)
