"""The products around the ops, by the kernels here or by PyTorch's: keys of a memory, and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attn_ext import luong_attention
from tests.cases import FACTORS

pytestmark = [pytest.mark.fused, pytest.mark.cpu]

MASKINGS = ("none", "lengths", "rows", "pairs", "lengths+rows", "nothing is seen")
# B, S, Dm, A: whole blocks and panels, and one more or less; more rows than columns and fewer; deep and shallow; so few
# rows that their sums are along vectors, up to 32, and one more.
SIZES = (
    (1, 1, 1, 1),
    (1, 1, 300, 65),
    (3, 5, 130, 70),
    (4, 8, 257, 33),
    (3, 11, 280, 20),
    (3, 5, 7, 2),
    (2, 33, 20, 65),
    (1, 256, 64, 64),
    (4, 100, 257, 129),
    (5, 129, 63, 300),
    (2, 300, 512, 257),
    (64, 70, 16, 17),
)
Gradients = tuple[Tensor, Tensor, Tensor]


def is_multiplied_here(call: Callable[[], object]) -> bool:
    with torch.autograd.profiler.profile() as profile:
        call()
    return any(event.name.startswith("attn_ext::cpu::matmul") for event in profile.function_events)


def make(B: int, S: int, Dm: int, A: int, masking: str = "none") -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Memory, weight, v, bias; lengths, mask."""
    generator = torch.Generator().manual_seed(B + S + Dm + A)
    randn = [torch.randn(shape, generator=generator) for shape in ((B, S, Dm), (A, 3 + Dm), (A,), (A,))]
    lengths = torch.randint(0, S + 1, (B,), generator=generator) if "lengths" in masking else None
    mask = None
    if "rows" in masking:
        mask = torch.rand(B, S, generator=generator) < 0.6
    elif masking == "pairs":
        mask = torch.rand(B, 2, S, generator=generator) < 0.4
    elif masking == "nothing is seen":
        mask = torch.zeros(B, S, dtype=torch.bool)
    return randn, lengths, mask


def seen(B: int, S: int, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, S]"""
    rows = torch.ones(B, S, dtype=torch.bool)
    if lengths is not None:
        rows &= torch.arange(S) < lengths.unsqueeze(1)
    if mask is not None:
        rows &= mask if mask.dim() == 2 else mask.any(1)
    return rows


def keys_and_gradients(
    tensors: list[Tensor], lengths: Tensor | None, mask: Tensor | None, grad_keys: Tensor
) -> tuple[Tensor, Gradients]:
    """A memory's keys, and what memory, weight and bias get of them."""
    memory, weight, v, bias = (tensor.detach().requires_grad_() for tensor in tensors)
    _, keys, _ = torch.ops.attn_ext.memory_node(memory, weight, v, bias, lengths, mask)
    return keys.detach(), torch.autograd.grad(keys, (memory, weight, bias), grad_keys)


def assert_near(actual: Tensor, expected: Tensor, depth: int, factors: torch.dtype = torch.float32) -> None:
    """Within what sums of so many products are rounded by, of such factors."""
    assert actual.dtype == torch.float32
    error = (actual.double() - expected).abs().max()
    assert error <= 4 * torch.finfo(factors).eps * max(depth, 4) ** 0.5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("precision", "counted"), [("highest", False), ("highest", True), ("high", False), ("medium", False)], ids=str
)
def test_keys_and_their_gradients(size: tuple[int, int, int, int], masking: str, precision: str, counted: bool) -> None:
    """Of rows that nobody may attend, NaN here, keys may be anything, and nothing is passed on.

    The products that are counted, and those of "medium", are PyTorch's.
    """
    torch.set_float32_matmul_precision(precision)
    B, S, Dm, A = size
    tensors, lengths, mask = make(*size, masking)
    rows = seen(B, S, lengths, mask).unsqueeze(-1)
    grad_keys = torch.randn(B, S, A).masked_fill(~rows, 0)
    tensors[0] = tensors[0].masked_fill(~rows, torch.nan)
    with FlopCounterMode(display=False) if counted else nullcontext():
        keys, (grad_memory, grad_weight, grad_bias) = keys_and_gradients(tensors, lengths, mask, grad_keys)
    memory, weight, _, bias = (tensor.double() for tensor in tensors)
    memory = memory.masked_fill(~rows, 0)
    expected = memory @ weight[:, 3:].T + bias
    factors = FACTORS[precision]
    assert_near(keys.masked_fill(~rows, 0), expected.masked_fill(~rows, 0), Dm, factors)
    assert_near(grad_memory, grad_keys.double() @ weight[:, 3:], A, factors)
    assert_near(grad_weight[:, 3:], grad_keys.double().flatten(0, 1).T @ memory.flatten(0, 1), B * S, factors)
    assert (grad_weight[:, :3] == 0).all()
    assert_near(grad_bias, grad_keys.double().sum((0, 1)), B * S)


@pytest.mark.parametrize("masking", ["none", "lengths+rows"])
@pytest.mark.parametrize("weight_type", ["its own", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 300, 65), (4, 8, 257, 33), (3, 50, 24, 40), (2, 300, 520, 257)], ids=str)
def test_halves_are_rounded_once(
    size: tuple[int, int, int, int], dtype: torch.dtype, weight_type: str, masking: str
) -> None:
    B, S, _, A = size
    tensors, lengths, mask = make(*size, masking)
    rows = seen(B, S, lengths, mask).unsqueeze(-1)
    tensors = [tensor.to(dtype) for tensor in tensors]
    tensors[0] = tensors[0].masked_fill(~rows, torch.nan)
    if weight_type == "float32":
        tensors[1], tensors[3] = tensors[1].float(), tensors[3].float()
    grad_keys = torch.randn(B, S, A, dtype=dtype).masked_fill(~rows, 0)
    keys, grads = keys_and_gradients(tensors, lengths, mask, grad_keys)
    memory, weight, _, bias = (tensor.double() for tensor in tensors)
    memory = memory.masked_fill(~rows, 0)
    grad = grad_keys.double()
    grad_weight = torch.zeros_like(weight)
    grad_weight[:, 3:] = grad.flatten(0, 1).T @ memory.flatten(0, 1)
    expected = (memory @ weight[:, 3:].T + bias, grad @ weight[:, 3:], grad_weight, grad.sum((0, 1)))
    # Halfway to the next number, and what the sum in float32 is off.
    for actual, wanted in zip((keys.masked_fill(~rows, 0), *grads), expected, strict=True):
        wanted = wanted.masked_fill(~rows, 0) if wanted.shape == keys.shape else wanted
        error = (actual.double() - wanted).abs()
        assert (
            error <= 0.5 * torch.finfo(actual.dtype).eps * wanted.abs() + 1e-5 * wanted.abs().max().clamp(min=1)
        ).all()


@pytest.mark.parametrize("depth", [31, 33, 65, 96, 255, 258])
@pytest.mark.parametrize("time_major", [False, True], ids=["by element", "time-major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hidden_row_stays_out_of_its_neighbours(dtype: torch.dtype, time_major: bool, depth: int) -> None:
    """However its size divides into what a library takes at once."""
    B, S = 2, 40
    memory = torch.randn(S, B, depth).transpose(0, 1) if time_major else torch.randn(B, S, depth)
    mask = (torch.arange(S) % 3 != 1).expand(B, S)
    memory = memory.masked_fill(~mask.unsqueeze(-1), torch.nan).to(dtype)
    query, weight, v = (torch.randn(size, dtype=dtype) for size in ((B, 5, 8), (33, 8 + depth), (33,)))
    for need_weights in (True, False):
        context, weights = luong_attention(
            query, memory, "concat", weight=weight, v=v, mask=mask, need_weights=need_weights
        )
        assert context.isfinite().all()
        assert weights is None or weights.isfinite().all()


@pytest.mark.parametrize("size", [(3, 50, 24, 40), (4, 129, 257, 66)], ids=str)
def test_any_layout(size: tuple[int, int, int, int]) -> None:
    """Time-major memories, transposed, sliced and repeated tensors, the same numbers everywhere."""
    tensors, lengths, mask = make(*size, "lengths+rows")
    B, S, _, A = size
    rows = seen(B, S, lengths, mask).unsqueeze(-1)
    grad_keys = torch.randn(B, S, A).masked_fill(~rows, 0)
    expected = keys_and_gradients(tensors, lengths, mask, grad_keys)

    def time_major(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    def sliced(tensor: Tensor) -> Tensor:
        wider = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        wider[..., 1:-2] = tensor
        return wider[..., 1:-2]

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor + 1], -1)[..., 0]

    memory, weight, v, bias = tensors
    variants = [[time_major(memory), weight, v, bias], [memory, weight, v, spread(bias)]]
    for layout in (turned, sliced, spread):
        variants += [[layout(memory), weight, v, bias], [memory, layout(weight), v, bias]]
    for variant in variants:
        keys, grads = keys_and_gradients(variant, lengths, mask, grad_keys)
        torch.testing.assert_close(keys.masked_fill(~rows, 0), expected[0].masked_fill(~rows, 0), rtol=1e-5, atol=1e-4)
        for grad, other in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-4)
    keys, grads = keys_and_gradients(tensors, lengths, mask, turned(grad_keys))
    for grad, other in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-4)


def skip_if_elsewhere() -> None:
    if not torch.ops.attn_ext.cpu_multiplies():
        pytest.skip("projections are PyTorch's here")


@pytest.mark.parametrize("gap", [1, 5, 6])
def test_rows_between_others_get_nothing(gap: int) -> None:
    """Nor do they pass anything on, though they may be multiplied with the others: what they hold is no number."""
    skip_if_elsewhere()
    (memory, weight, v, bias), *_ = make(2, 100, 40, 70)
    mask = (torch.arange(100) % (gap + 1) == 0).expand(2, -1)
    grad_keys = torch.randn(2, 100, 70).masked_fill(~mask.unsqueeze(-1), torch.nan)
    _, (grad_memory, grad_weight, _) = keys_and_gradients([memory, weight, v, bias], None, mask, grad_keys)
    assert (grad_memory[~mask] == 0).all()
    assert_near(grad_memory[mask], grad_keys[mask].double() @ weight[:, 3:].double(), 70)
    assert_near(grad_weight[:, 3:], grad_keys[mask].double().T @ memory[mask].double(), 200)


@pytest.mark.parametrize("size", [(4, 300, 200, 130), (2, 8, 512, 300)], ids=str)
def test_the_number_of_threads_changes_no_bit(size: tuple[int, int, int, int]) -> None:
    skip_if_elsewhere()
    tensors, lengths, mask = make(*size, "lengths")
    B, S, _, A = size
    grad_keys = torch.randn(B, S, A)
    one_and_more = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        keys, grads = keys_and_gradients(tensors, lengths, mask, grad_keys)
        one_and_more.append((keys, *grads[:2]))
    for results in one_and_more[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, one_and_more[0], strict=True))


def test_which_products_are_made_here() -> None:
    """On a processor whose vectors or matrix tiles PyTorch's library leaves unused, and exact ones, if nobody looks on.

    Of float32 and float16; of bfloat16, which has products of its own, the smallest.
    """
    ours = torch.ops.attn_ext.cpu_multiplies()
    tensors, lengths, mask = make(2, 30, 20, 40, "lengths")
    query = torch.randn(2, 3, 3)

    def call(tensors: list[Tensor], query: Tensor = query) -> Tensor:
        memory, weight, v, bias = tensors
        options = (lengths, mask, 1.0, True, False)
        return torch.ops.attn_ext.projected_attention(query, weight, memory, v, bias, *options)[0]

    if not ours:
        assert not is_multiplied_here(lambda: call(tensors))
        return
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert is_multiplied_here(lambda: call(tensors))
    context = call(leaves)
    grads = torch.randn_like(context)
    assert is_multiplied_here(lambda: torch.autograd.grad(context, leaves, grads, retain_graph=True))
    assert not is_multiplied_here(lambda: torch.autograd.grad(context, leaves, grads, create_graph=True))
    double = [tensor.double() for tensor in tensors]
    assert not is_multiplied_here(lambda: call(double, query.double()))
    for rows, is_small in ((1, True), (16, True), (17, False), (256, False)):
        features, weight = torch.randn(1, rows, 512), torch.randn(512, 512)
        for dtype in (torch.float16, torch.bfloat16):
            options = (None, None, 1.0, False, False)
            arguments = (features.to(dtype), weight.to(dtype), features.to(dtype), None, None, *options)
            is_here = is_multiplied_here(partial(torch.ops.attn_ext.projected_attention, *arguments))
            assert is_here == (is_small or dtype == torch.float16)
    torch.set_float32_matmul_precision("medium")
    assert not is_multiplied_here(lambda: call(tensors))


@pytest.mark.parametrize(
    ("settings", "value", "ours"),
    [
        (torch.backends.cuda.matmul, "tf32", True),
        (torch.backends.mkldnn.matmul, "ieee", True),
        (torch.backends.mkldnn.matmul, "bf16", False),
        (torch.backends.mkldnn.matmul, "tf32", True),
    ],
    ids=["cuda-tf32", "mkldnn-ieee", "mkldnn-bf16", "mkldnn-tf32"],
)
def test_a_precision_set_for_one_backend(settings: Any, value: str, ours: bool) -> None:
    """From then on PyTorch refuses to say what holds for all of them."""
    tensors = [torch.randn(2, 3, 64), torch.randn(2, 64, 64), torch.randn(64, 64)]
    settings.fp32_precision = value

    def call() -> None:
        query, memory, weight = (tensor.detach().requires_grad_() for tensor in tensors)
        luong_attention(query, memory, "general", weight=weight)[0].sum().backward()

    assert is_multiplied_here(call) == (ours and torch.ops.attn_ext.cpu_multiplies())


def test_a_trace_has_the_products_in_it() -> None:
    """They are steps of it, and not what they came to while it was taken."""
    tensors, lengths, mask = make(2, 30, 20, 40, "lengths")
    memory, weight, v, bias = tensors

    def call(query: Tensor, memory: Tensor) -> Tensor:
        options = (lengths, mask, 1.0, True, False)
        return torch.ops.attn_ext.projected_attention(query, weight, memory, v, bias, *options)[0]

    queries = torch.randn(2, 2, 3, 3)
    traced = torch.jit.trace(call, (queries[0], memory), check_trace=False)
    other = torch.randn_like(memory)
    torch.testing.assert_close(traced(queries[1], other), call(queries[1], other))
