"""AttentionMemory: a loop's steps give what autograd alone would give, under everything that autograd allows."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext import AttentionMemory, LuongAttention
from tests import cases

B, T, S, DQ, DM, A = 3, 5, 7, 8, 12, 10
MODULES: dict[str, dict[str, Any]] = {
    "dot": {"hidden_size": DM},
    "general": {"hidden_size": DQ, "memory_size": DM},
    "concat": {"hidden_size": DQ, "memory_size": DM, "attention_size": A},
    "concat with bias": {"hidden_size": DQ, "memory_size": DM, "attention_size": A, "bias": True, "scale": 0.5},
}
MASKINGS: dict[str, dict[str, Any]] = {
    "everything": {},
    "lengths": {"lengths": torch.tensor([S, 0, 3])},
    "rows": {"mask": torch.arange(S).expand(B, S) % 3 > 0},
    "step": {"mask": (torch.arange(S) + torch.arange(B).view(B, 1, 1)) % 3 > 0},
}
Outputs = list[tuple[Tensor, Tensor]]


class Loop:
    """A decoder that feeds the context back, over one batch: its leaves, its steps, and the gradients of its leaves."""

    def __init__(self, name: str, masking: str = "everything", dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.attention = LuongAttention(name.split()[0], **MODULES[name], dtype=dtype)
        self.masking = MASKINGS[masking]
        self.encoder_outputs = torch.randn(B, S, DM, dtype=dtype).requires_grad_()
        self.start = torch.randn(B, self.attention.hidden_size, dtype=dtype).requires_grad_()
        self.others = torch.randn(B, S, DM, dtype=dtype).requires_grad_()  # encoder outputs of another memory
        self.leaves = [self.encoder_outputs, self.start, self.others, *self.attention.parameters()]

    def memory(self) -> AttentionMemory:
        return self.attention.memory(self.encoder_outputs, **self.masking)

    def steps(self, memory: AttentionMemory | Tensor, count: int = T, start: Tensor | None = None) -> Outputs:
        hidden = self.start if start is None else start
        options = {} if isinstance(memory, AttentionMemory) else self.masking
        outputs = []
        for _ in range(count):
            context, weights = self.attention(hidden, memory, **options)
            hidden = torch.tanh(hidden + context[:, : hidden.shape[1]])
            outputs.append((context, weights))
        return outputs

    def grads(self, loss: Tensor, leaves: list[Tensor] | None = None, **options: Any) -> list[Tensor | None]:
        leaves = self.leaves if leaves is None else leaves
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, **options))

    def accumulated(self) -> list[Tensor | None]:
        return [leaf.grad for leaf in self.leaves]


def loss_of(outputs: Outputs) -> Tensor:
    return sum(((context.sin().sum() + weights.square().sum()) for context, weights in outputs), torch.tensor(0.0))


def one_loss(loop: Loop) -> list[Tensor | None]:
    outputs = loop.steps(loop.memory())
    return [*(tensor for pair in outputs for tensor in pair), *loop.grads(loss_of(outputs))]


def several_losses(loop: Loop) -> list[Tensor | None]:
    for output in loop.steps(loop.memory()):
        loss_of([output]).backward(retain_graph=True)
    return loop.accumulated()


def the_same_loss_twice(loop: Loop) -> list[Tensor | None]:
    loss = loss_of(loop.steps(loop.memory()))
    loss.backward(retain_graph=True)
    loss.backward()
    return loop.accumulated()


def some_inputs_only(loop: Loop) -> list[Tensor | None]:
    loss = loss_of(loop.steps(loop.memory()))
    results = []
    for leaf in loop.leaves:
        results += loop.grads(loss, [leaf], retain_graph=True)
    return [*results, *loop.grads(loss)]


def unused_outputs(loop: Loop) -> list[Tensor | None]:
    outputs = loop.steps(loop.memory())
    return loop.grads(outputs[0][0].sum() + outputs[2][1].square().sum() + outputs[3][0].square().sum())


def contexts_only(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    return loop.grads(memory.attend(loop.start, need_weights=False)[0].sin().sum())


def weights_only(loop: Loop) -> list[Tensor | None]:
    return loop.grads(loop.attention(loop.start, loop.memory())[1].square().sum())


def several_queries_a_step(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    outputs = [
        loop.attention(
            torch.stack([loop.start * (t + k) for k in range(1 if "mask" in loop.masking else 3)], 1), memory
        )
        for t in range(3)
    ]
    return loop.grads(loss_of(outputs))


def many_queries_and_steps(loop: Loop) -> list[Tensor | None]:
    """Of one memory; "step" masks are of one query."""
    memory = loop.memory()
    many = loop.start.unsqueeze(1) * torch.linspace(0.5, 2, 1 if loop.masking.get("mask") is not None else 17).view(
        -1, 1
    )
    first = loop.grads(loss_of([loop.attention(many, memory)]), retain_graph=True)
    both = [loop.attention(many, memory), *loop.steps(memory)]
    return [*first, *loop.grads(loss_of(both))]


def the_keys_themselves(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    if memory.keys is None or loop.masking:  # rows that no query may attend hold anything
        return one_loss(loop)
    penalty = memory.keys.square().sum()
    alone = loop.grads(penalty, retain_graph=True)
    return [*alone, *loop.grads(penalty + loss_of(loop.steps(memory)))]


def every_step_in_a_checkpoint(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()

    def step(hidden: Tensor) -> Tensor:
        return torch.tanh(hidden + loop.attention(hidden, memory)[0][:, : hidden.shape[1]])

    hidden = loop.start
    for _ in range(T):
        hidden = checkpoint(step, hidden, use_reentrant=False)
    return loop.grads(hidden.square().sum())


def the_loop_in_a_checkpoint(loop: Loop, reentrant: bool = False) -> list[Tensor | None]:
    def run(encoder_outputs: Tensor, start: Tensor) -> Tensor:
        memory = loop.attention.memory(encoder_outputs, **loop.masking)
        return loss_of(loop.steps(memory, start=start))

    checkpoint(run, loop.encoder_outputs, loop.start, use_reentrant=reentrant).backward()
    return loop.accumulated()


def the_loop_in_a_reentrant_checkpoint(loop: Loop) -> list[Tensor | None]:
    return the_loop_in_a_checkpoint(loop, reentrant=True)


def two_memories_interleaved(loop: Loop) -> list[Tensor | None]:
    memories = loop.memory(), loop.attention.memory(loop.others, **loop.masking)
    hidden, outputs = loop.start, []
    for t in range(T):
        context, weights = loop.attention(hidden, memories[t % 2])
        hidden = torch.tanh(hidden + context[:, : hidden.shape[1]])
        outputs.append((context, weights))
    return loop.grads(loss_of(outputs))


def two_decoders_and_the_loss_itself(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    first, second = loop.steps(memory), loop.steps(memory, start=loop.start.flip(0) * 2)
    return loop.grads(loss_of(first) * loss_of(second) + loop.encoder_outputs.square().sum())


def an_exception_in_between(loop: Loop) -> list[Tensor | None]:
    outputs = loop.steps(loop.memory())
    loss = loss_of(outputs)

    def fail(_: Tensor) -> None:
        raise KeyError("in the middle")

    handle = outputs[2][0].register_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="in the middle"):
            loss.backward(retain_graph=True)
    handle.remove()
    for leaf in loop.leaves:
        leaf.grad = None
    loss.backward()
    return loop.accumulated()


def anomaly_mode(loop: Loop) -> list[Tensor | None]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return one_loss(loop)


def another_thread(loop: Loop) -> list[Tensor | None]:
    loss = loss_of(loop.steps(loop.memory()))
    results: list[Tensor | None] = []
    thread = threading.Thread(target=lambda: results.extend(loop.grads(loss)))
    thread.start()
    thread.join()
    return results


def several_threads(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    losses = [loss_of(loop.steps(memory, start=loop.start * (i + 1))) for i in range(4)]
    results: list[list[Tensor | None]] = [[] for _ in losses]

    def run(i: int) -> None:
        for _ in range(20):
            results[i] = loop.grads(losses[i], retain_graph=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [grad for grads in results for grad in grads]


def a_backward_within_the_backward(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    inner = loss_of(loop.steps(memory))
    outer = loop.steps(memory, start=loop.start * 3)
    within: list[Tensor | None] = []
    outer[2][0].register_hook(lambda _: within.extend(loop.grads(inner, retain_graph=True)))
    return [*loop.grads(loss_of(outer)), *within]


def without_a_graph_in_between(loop: Loop) -> list[Tensor | None]:
    memory = loop.memory()
    first = loop.steps(memory, 2)
    values = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            values += [tensor.clone() for pair in loop.steps(memory, 2) for tensor in pair]
    assert not any(value.requires_grad for value in values)
    return [*values, *loop.grads(loss_of(first) + loss_of(loop.steps(memory, start=loop.start * 2)))]


def made_without_a_graph(loop: Loop) -> list[Tensor | None]:
    """Keys have no gradient then; the queries, the memory and the query's part of the weight do."""
    with torch.no_grad():
        memory = loop.memory()
    return loop.grads(loss_of(loop.steps(memory)))


def a_frozen_encoder(loop: Loop) -> list[Tensor | None]:
    loop.encoder_outputs.requires_grad_(False)
    return loop.grads(loss_of(loop.steps(loop.memory())), loop.leaves[1:])


def frozen_parameters(loop: Loop) -> list[Tensor | None]:
    loop.attention.requires_grad_(False)
    return loop.grads(loss_of(loop.steps(loop.memory())), loop.leaves[:3])


def only_v(loop: Loop) -> list[Tensor | None]:
    """Keys do not depend on it."""
    if loop.attention.Va is None:
        return one_loss(loop)
    for leaf in loop.leaves:
        leaf.requires_grad_(leaf is loop.attention.Va)
    memory = loop.memory()
    many = loop.attention(
        loop.start.unsqueeze(1) * torch.ones(1 if loop.masking.get("mask") is not None else 17, 1), memory
    )
    alone = loop.grads(loss_of([many]), [loop.attention.Va], retain_graph=True)
    return [*alone, *loop.grads(loss_of([many, *loop.steps(memory)]), [loop.attention.Va])]


def only_the_hidden_states(loop: Loop) -> list[Tensor | None]:
    loop.attention.requires_grad_(False)
    loop.encoder_outputs.requires_grad_(False)
    return loop.grads(loss_of(loop.steps(loop.memory())), [loop.start])


def saved_tensors_elsewhere(loop: Loop) -> list[Tensor | None]:
    with torch.autograd.graph.save_on_cpu():
        return loop.grads(loss_of(loop.steps(loop.memory())))


def a_parameter_that_is_updated_within_the_backward(loop: Loop) -> list[Tensor | None]:
    """A learned first state, by a hook, as soon as its gradient is there: before the memory's."""
    first = loop.start[:1].detach().clone().requires_grad_()

    def update(parameter: Tensor) -> None:
        parameter.data -= parameter.grad
        parameter.detach().mul_(2)
        parameter.grad = None

    first.register_post_accumulate_grad_hook(update)
    loss_of(loop.steps(loop.memory(), start=first.expand(B, -1))).backward()
    return [first.detach(), *loop.accumulated()]


def a_gradient_that_a_leaf_makes_its_own(loop: Loop) -> list[Tensor | None]:
    """That of a residual is the context's, and what is done to it later is done to the leaf's alone."""
    residual = torch.zeros(B, DM, dtype=torch.float64).requires_grad_()
    residual.register_post_accumulate_grad_hook(lambda leaf: [leaf.grad.mul_(0.01), None][1])
    memory = loop.memory()
    added = residual + 1.0  # whose backward is behind the step's and before the memory's
    ((context, weights),) = loop.steps(memory, count=1)
    ((context + added).square().sum() + weights.square().sum()).backward()
    return [residual.grad, *loop.accumulated()]


SCENARIOS = (
    one_loss,
    several_losses,
    the_same_loss_twice,
    some_inputs_only,
    unused_outputs,
    contexts_only,
    weights_only,
    several_queries_a_step,
    many_queries_and_steps,
    the_keys_themselves,
    every_step_in_a_checkpoint,
    the_loop_in_a_checkpoint,
    the_loop_in_a_reentrant_checkpoint,
    two_memories_interleaved,
    two_decoders_and_the_loss_itself,
    an_exception_in_between,
    anomaly_mode,
    another_thread,
    several_threads,
    a_backward_within_the_backward,
    without_a_graph_in_between,
    made_without_a_graph,
    a_frozen_encoder,
    frozen_parameters,
    only_v,
    only_the_hidden_states,
    saved_tensors_elsewhere,
    a_parameter_that_is_updated_within_the_backward,
    a_gradient_that_a_leaf_makes_its_own,
)


def assert_same_gradients(actual: list[Tensor | None], expected: list[Tensor | None], **tolerances: float) -> None:
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        # Where the reference's autograd knows no gradient, zeros are one.
        zero = torch.zeros(()) if a is None or e is None else None
        if zero is None:
            torch.testing.assert_close(a, e, **tolerances)
        else:
            assert all(not grad.any() for grad in (a, e) if grad is not None)


@pytest.mark.parametrize("masking", ["everything", "lengths", "rows", "pairs"])
@pytest.mark.parametrize("name", MODULES)
def test_is_the_functional_form(name: str, masking: str, each_backend: str) -> None:
    """All queries in one call, and one by one: values and every gradient of a call without a memory."""
    loop = Loop(name)
    pairs = (torch.arange(S) + torch.arange(T).unsqueeze(1)).expand(B, T, S) % 3 > 0
    options = {"mask": pairs} if masking == "pairs" else MASKINGS[masking]
    hidden = torch.randn(B, T, loop.attention.hidden_size, dtype=torch.float64).requires_grad_()

    def at_once() -> tuple[Tensor, Tensor]:
        return loop.attention(hidden, loop.attention.memory(loop.encoder_outputs, **options))

    def one_by_one() -> tuple[Tensor, Tensor]:
        memory = loop.attention.memory(loop.encoder_outputs, **options)
        steps = [loop.attention(hidden[:, t], memory) for t in range(T)]
        context, weights = (torch.stack(outputs, dim=1) for outputs in zip(*steps, strict=True))
        return context, weights

    def results(*output: Tensor) -> list[Tensor | None]:
        return [*output, *loop.grads(loss_of([output]), [hidden, *loop.leaves])]

    expected = results(*loop.attention(hidden, loop.encoder_outputs, **options))
    for attend in (at_once, one_by_one) if masking != "pairs" else (at_once,):
        assert_same_gradients(results(*attend()), expected)


def test_without_a_module() -> None:
    loop = Loop("concat with bias")
    attention, lengths = loop.attention, [2, 1, 0]
    parameters = {"weight": attention.Wa.weight, "v": attention.Va, "bias": attention.Wa.bias, "scale": 0.5}
    memory = AttentionMemory(loop.encoder_outputs, "concat", **parameters, lengths=lengths)
    expected = attention(loop.start, loop.encoder_outputs, lengths)
    for context, weights in (memory.attend(loop.start), attn_ext.luong_attention(loop.start, memory)):
        torch.testing.assert_close((context, weights), expected)
    assert memory.attend(loop.start, need_weights=False)[1] is None


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("queries", [1, 17], ids=["a step", "many queries"])
@pytest.mark.parametrize("name", MODULES)
def test_without_weights(name: str, queries: int, autocast: bool, each_backend: str) -> None:
    """None for them, and the same context, on every way that a call may go."""
    loop = Loop(name, "lengths", torch.float32)
    hidden = loop.start.unsqueeze(1).expand(-1, queries, -1)
    with torch.autocast(cases.DEVICE, torch.bfloat16, enabled=autocast):
        memory = loop.memory()
        expected, weights = memory.attend(hidden)
        assert weights.shape == (B, queries, S)
        context, weights = memory.attend(hidden, need_weights=False)
    assert weights is None
    torch.testing.assert_close(context, expected)


@pytest.mark.fused
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_as_without_deferring(scenario: Callable[[Loop], list[Tensor | None]], name: str, masking: str) -> None:
    """What the reference backend, plain autograd, gives in the same situation, in float64."""
    with attn_ext.use_backend("reference"):
        expected = scenario(Loop(name, masking))
    with attn_ext.use_backend("fused"):
        actual = scenario(Loop(name, masking))
    assert_same_gradients(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_types(name: str, dtype: torch.dtype) -> None:
    """Each gradient in its own tensor's dtype, near that of a call without a memory."""
    loop = Loop(name, "lengths", dtype)
    deferred = loop.grads(loss_of(loop.steps(loop.memory())).float())
    plain = loop.grads(loss_of(loop.steps(loop.encoder_outputs)).float())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]
    for leaf, a, e in zip(loop.leaves, deferred, plain, strict=True):
        if e is not None:
            assert a is not None
            assert a.dtype == leaf.dtype
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


@pytest.mark.fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """The steps of a loop under autocast defer too: gradients in the parameters' own dtype, near the exact ones."""
    loop = Loop(name, "lengths", torch.float32)
    expected = loop.grads(loss_of(loop.steps(loop.encoder_outputs)))
    with torch.autocast(cases.DEVICE, dtype):
        counts, outputs = calls(lambda: loop.steps(loop.memory()))
        assert outputs[0][0].dtype == dtype
    assert counts["attn_ext::memory_attention"] == T
    counts, actual = calls(lambda: loop.grads(loss_of(outputs)))
    assert counts["attn_ext::attention_backward"] == T
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=0.1, atol=0.1 * e.abs().max().item())


@pytest.mark.parametrize("name", MODULES)
def test_made_outside_of_autocast(name: str, each_backend: str) -> None:
    """It stays what it was made, whatever the queries come as: in a step, with many queries, and in the gradients."""
    loop = Loop(name, "lengths", torch.float32)
    for queries in (loop.start, loop.start.unsqueeze(1).expand(-1, 17, -1)):
        expected = loop.attention(queries, loop.memory())
        memory = loop.memory()
        with torch.autocast(cases.DEVICE, torch.bfloat16):
            outputs = loop.attention(queries, memory)
            rounded = loop.attention(queries.bfloat16(), memory)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(rounded, expected, rtol=0.05, atol=0.05)
        assert rounded[0].dtype == torch.float32
        assert_same_gradients(loop.grads(loss_of([outputs])), loop.grads(loss_of([expected])))


@pytest.mark.parametrize("name", MODULES)
def test_made_within_autocast(name: str, each_backend: str) -> None:
    """A refusal of float32 queries outside of it says where the other dtype is from."""
    loop = Loop(name, dtype=torch.float32)
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        memory = loop.memory()
    text = "the memory is torch.bfloat16, as torch.autocast made it, but hidden is torch.float32; they must be the same"
    with pytest.raises(TypeError, match=text):
        loop.attention(loop.start, memory)


@pytest.mark.fused
@pytest.mark.parametrize("name", ["dot", "concat"])
def test_large_scores(name: str) -> None:
    """Queries and keys out of the range of factored exponentials, in some tiles and not in others."""
    loop = Loop(name, "everything")
    with torch.no_grad():
        loop.start[0] *= 40
        loop.encoder_outputs[0, 1] *= 60
        loop.encoder_outputs[2] *= 200
    with attn_ext.use_backend("reference"):
        expected = one_loss(loop)
    assert_same_gradients(one_loss(loop), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.fused
@pytest.mark.parametrize("masking", ["lengths", "rows", "step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_junk_in_masked_rows(name: str, dtype: torch.dtype, masking: str) -> None:
    """Rows that nobody attends may hold anything, in both directions."""
    expected = one_loss(Loop(name, masking, dtype))
    junk = Loop(name, masking, dtype)
    lengths, mask = (junk.masking.get(each) for each in ("lengths", "mask"))
    seen = torch.arange(S) < lengths.unsqueeze(1) if mask is None else mask.view(B, S)
    with torch.no_grad():
        junk.encoder_outputs[~seen] = float("nan")
        junk.encoder_outputs[1][~seen[1]] = float("inf")
    assert_same_gradients(one_loss(junk), expected)


@pytest.mark.parametrize("masking", ["lengths", "rows", "step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_masked_rows_get_nothing_of_what_is_no_number(
    name: str, dtype: torch.dtype, masking: str, each_backend: str
) -> None:
    """Neither of a query nor of a gradient: their weights are 0, and 0 times NaN would be NaN."""
    loop = Loop(name, masking, dtype)
    context, _ = loop.attention(loop.start, loop.memory())
    grad_context = torch.full_like(context, float("nan"))
    (grad,) = torch.autograd.grad(context, loop.encoder_outputs, grad_context, retain_graph=True)
    lengths, mask = (loop.masking.get(each) for each in ("lengths", "mask"))
    seen = torch.arange(S) < lengths.unsqueeze(1) if mask is None else mask.view(B, S)
    assert not grad[~seen].any()
    assert grad[seen].isnan().all()


@pytest.mark.parametrize("sizes", [(0, S), (B, 0)], ids=["no batch", "no memory"])
@pytest.mark.parametrize("name", MODULES)
def test_sizes_of_zero(name: str, sizes: tuple[int, int], each_backend: str) -> None:
    loop = Loop(name)
    encoder_outputs = torch.zeros(*sizes, DM, dtype=torch.float64, requires_grad=True)
    memory = loop.attention.memory(encoder_outputs)
    queries = torch.zeros(sizes[0], loop.attention.hidden_size, dtype=torch.float64, requires_grad=True)
    outputs = [loop.attention(queries, memory), loop.attention(queries.unsqueeze(1).expand(-1, 0, -1), memory)]
    grads = torch.autograd.grad(loss_of(outputs), [encoder_outputs, queries])
    assert all(not grad.any() for grad in grads)


def calls(function: Callable[[], Any]) -> tuple[Counter[str], Any]:
    """How often each op ran, and the result."""
    with torch.autograd.profiler.profile() as profile:
        result = function()
    return Counter(event.name for event in profile.function_events), result


@pytest.mark.fused
@pytest.mark.parametrize("name", MODULES)
def test_a_penalty_is_not_lost_on_what_comes_behind_the_context(name: str) -> None:
    """Under create_graph a gradient depends on those that came in: what these depend on gets none without a word."""
    loop = Loop(name)
    behind = torch.ones(DM, dtype=torch.float64, requires_grad=True)
    task = (loop.attention(loop.start, loop.memory())[0] * behind).sum()
    (grad,) = torch.autograd.grad(task, loop.encoder_outputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(task + grad.pow(2).sum(), behind)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.functional.jvp(
            lambda outputs: loop.attention(loop.start, loop.attention.memory(outputs))[0],
            loop.encoder_outputs.detach(),
            torch.ones_like(loop.encoder_outputs),
        )


@pytest.mark.fused
@pytest.mark.parametrize("name", MODULES)
def test_what_is_deferred(name: str) -> None:
    """A step's backward takes its query's gradient; the rest is taken once, however many steps there were."""
    loop = Loop(name)
    loss = loss_of(loop.steps(loop.memory()))
    counts, _ = calls(lambda: loop.grads(loss))
    assert counts["attn_ext::attention_backward"] == T
    assert counts["aten::bmm"] == 1
    assert counts["attn_ext::additive_scores_backward"] == (1 if "concat" in name else 0)
    # The query's at each step; the weight's, of concat in two parts. The memory's through the keys joins the other.
    assert counts["aten::mm"] == {"dot": 0, "general": T + 1}.get(name, T + 2)
    assert counts["aten::addmm_"] == (1 if "concat" in name else 0)
    queries = loop.start.unsqueeze(1).expand(-1, 17, -1)
    memory = loop.memory()
    for step, is_deferred in ((loop.start, True), (queries, False)):
        counts, _ = calls(lambda step=step: loop.attention(step, memory))
        assert counts["attn_ext::memory_attention"] == is_deferred


@pytest.mark.fused
@pytest.mark.parametrize("name", MODULES)
def test_second_derivative(name: str) -> None:
    """The first is as ever under create_graph; the second raises, naming the form that has one."""
    loop = Loop(name)
    expected = loop.grads(loss_of(loop.steps(loop.memory())))
    loss = loss_of(loop.steps(loop.memory()))
    grads = loop.grads(loss, create_graph=True)
    assert_same_gradients(grads, expected)
    for grad in grads:
        for leaf in loop.leaves:
            if grad is not None and leaf is not loop.others:
                with pytest.raises(NotImplementedError, match=r"no second derivative.*luong_attention"):
                    torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("masking", ["everything", "lengths"])
@pytest.mark.parametrize("name", MODULES)
def test_second_derivative_of_many_queries(name: str, masking: str, each_backend: str) -> None:
    """They are no steps: nothing of theirs is deferred. NaN behind the lengths is hidden here, too."""

    def derivatives(attend: Callable[[Loop, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        loop = Loop(name, masking)
        if masking == "lengths":
            loop.encoder_outputs.data[2, 3:] = float("nan")
        many = loop.start.unsqueeze(1) * torch.linspace(0.5, 2, 17, dtype=torch.float64).view(-1, 1)
        first = [grad for grad in loop.grads(loss_of([attend(loop, many)]), create_graph=True) if grad is not None]
        return loop.grads(sum((grad.square().sum() for grad in first), torch.tensor(0.0)))

    with attn_ext.use_backend("reference"):
        expected = derivatives(lambda loop, many: loop.attention(many, loop.encoder_outputs, **loop.masking))
    actual = derivatives(lambda loop, many: loop.attention(many, loop.memory()))
    assert all(grad.isfinite().all() for grad in actual if grad is not None)
    assert_same_gradients(actual, expected)


@pytest.mark.fused
@pytest.mark.parametrize("name", ["dot", "concat"])
def test_gradcheck(name: str) -> None:
    loop = Loop(name, "lengths")

    def run(*leaves: Tensor) -> Tensor:
        encoder_outputs, start, others, *_ = leaves
        return loss_of(loop.steps(loop.attention.memory(encoder_outputs * 2 + others, lengths=[S, 0, 3]), 2, start))

    assert torch.autograd.gradcheck(run, loop.leaves)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("name", MODULES)
def test_compiled_steps(name: str, where: str, each_backend: str) -> None:
    """torch.compile sees the plain ops, wherever the memory is made."""
    loop = Loop(name, "lengths")
    expected = one_loss(loop)[2 * T :]
    step = torch.compile(loop.attention, backend="aot_eager", fullgraph=True)

    def steps(memory: AttentionMemory) -> Tensor:
        hidden, outputs = loop.start, []
        for _ in range(T):
            context, weights = step(hidden, memory) if where == "outside" else loop.attention(hidden, memory)
            hidden = torch.tanh(hidden + context[:, : hidden.shape[1]])
            outputs.append((context, weights))
        return loss_of(outputs)

    if where == "outside":
        loss = steps(loop.memory())
    else:
        loss = torch.compile(lambda: steps(loop.memory()), backend="aot_eager", fullgraph=True)()
    assert_same_gradients(loop.grads(loss), expected)


@pytest.mark.fused
@pytest.mark.parametrize("name", MODULES)
def test_backwards_of_one_memory(name: str) -> None:
    """It is one node: without retain_graph a second backward over its steps raises, over another it does not."""
    loop = Loop(name)
    memory = loop.memory()
    loop.grads(loss_of(loop.steps(memory)), retain_graph=True)
    loop.grads(loss_of(loop.steps(memory)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loop.grads(loss_of(loop.steps(memory)))
    loop.grads(loss_of(loop.steps(loop.memory())))


@pytest.mark.fused
def test_in_place_change_is_noticed() -> None:
    loop = Loop("dot")
    encoder_outputs = loop.encoder_outputs * 1
    outputs = loop.steps(loop.attention.memory(encoder_outputs))
    encoder_outputs.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(outputs).backward()


@pytest.mark.fused
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_in_place_change_within_the_backward_is_noticed(method: str) -> None:
    """Of a gradient that the step's backward has left for the memory's."""
    attention = LuongAttention(method, 6)
    memory = attention.memory(torch.randn(2, 5, 6).requires_grad_())
    added = torch.randn(2, 6).requires_grad_() * 1
    added.register_hook(lambda grad: [grad.mul_(2), None][1])
    context, _ = attention(torch.randn(2, 6), memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between the backward of the step and"):
        (context + added).square().sum().backward()


@pytest.mark.fused
def test_in_place_change_of_weights_within_the_backward_is_noticed() -> None:
    attention = LuongAttention("dot", 6)
    memory = attention.memory(torch.randn(2, 5, 6).requires_grad_())
    query = torch.randn(2, 6).requires_grad_() * 1  # made later, and so differentiated before the memory
    context, weights = attention(query, memory)
    query.register_hook(lambda grad: [weights.detach().zero_(), None][1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation between the backward of the step and"):
        (context.square().sum() + weights.sum()).backward()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
@pytest.mark.parametrize("late", ["the memory", "its weight", "its v", "its bias"])
@pytest.mark.parametrize("others", [False, True], ids=["no other gradient", "others"])
def test_a_gradient_asked_for_too_late(others: bool, late: str, method: str, autocast: bool, each_backend: str) -> None:
    attention = LuongAttention(method, 6, bias=method == "concat").requires_grad_(False)
    query, encoder_outputs = torch.randn(2, 6), torch.randn(2, 5, 6)
    parts = {"the memory": encoder_outputs, "its v": attention.Va}
    if attention.Wa is not None:
        parts |= {"its weight": attention.Wa.weight, "its bias": attention.Wa.bias}
    tensor = parts.pop(late, None)
    others_there = [part for part in parts.values() if part is not None]
    if tensor is None or (others and not others_there):
        pytest.skip(f"{method} has none")
    if others:
        others_there[0].requires_grad_()
    with torch.autocast(cases.DEVICE, torch.bfloat16, enabled=autocast):
        memory = attention.memory(encoder_outputs)
    query = query.to(memory.memory.dtype)
    expected = attention(query, memory)
    tensor.requires_grad_()
    with pytest.raises(ValueError, match=rf"^LuongAttention: {late} requires a gradient, .* after requires_grad_\(\)$"):
        attention(query, memory)
    with torch.no_grad():
        torch.testing.assert_close(attention(query, memory), expected)
    attention(query.float(), attention.memory(encoder_outputs))[0].sum().backward()
    assert tensor.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_lengths_may_be_written_at_once() -> None:
    """Their copy is not waited for: the device may take it much later."""
    encoder_outputs = torch.randn(4, 50, 64, device="cuda")
    lengths = torch.tensor([50, 1, 30, 0], device="cpu").pin_memory()
    expected = lengths.tolist()
    torch.cuda._sleep(100_000_000)
    memory = AttentionMemory(encoder_outputs, lengths=lengths)
    lengths.fill_(7)
    assert memory.lengths.tolist() == expected


@pytest.mark.fused
def test_the_node_is_checked() -> None:
    """The op by itself: what is no node of a memory is refused."""
    query, memory = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, 4)
    for node in (None, torch.zeros(0), torch.zeros(0, requires_grad=True), memory * query.sum()):
        with pytest.raises(ValueError, match="node must be what memory_node returned"):
            torch.ops.attn_ext.memory_attention(query, None, memory, None, None, None, None, None, 1.0, True, node)
    for weight, v, bias, text in (
        (None, torch.zeros(4), None, "v came without weight"),
        (memory, torch.zeros(4), None, r"weight has shape \[2, 3, 4\]"),
        (torch.zeros(4, 8), None, torch.zeros(4), "bias came without v"),
        (torch.zeros(4, 8), torch.zeros(4), torch.zeros(1), r"bias has shape \[1\], needed is \[4\]"),
    ):
        with pytest.raises(ValueError, match=text):
            torch.ops.attn_ext.memory_node(memory, weight, v, bias, None, None)


@pytest.mark.parametrize("name", MODULES)
def test_copies(name: str, each_backend: str) -> None:
    """A memory of a graph is no thing to copy; one made as the refusal advises is data like any other."""
    loop = Loop(name)
    encoder_outputs = loop.encoder_outputs * 1
    with torch.no_grad():
        of_a_graph = loop.attention.memory(encoder_outputs)
    for in_graph in (loop.memory(), of_a_graph):
        for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(
                TypeError, match=r"neither copied nor pickled.*under torch.no_grad\(\) from detached ones"
            ):
                attempt(in_graph)
    with torch.no_grad():
        data = loop.attention.memory(loop.encoder_outputs.detach(), **MASKINGS["lengths"])
        expected = data.attend(loop.start)
        for again in (copy.deepcopy(data), pickle.load(io.BytesIO(pickle.dumps(data)))):
            assert all(map(torch.equal, again.attend(loop.start), expected))


@pytest.mark.fused
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("ending", ["backward", "retained", "raises", "never"])
def test_nothing_keeps_a_memory_alive(name: str, ending: str) -> None:
    """No reference cycle: without the garbage collector, memory and encoder outputs go with their last name."""
    loop = Loop(name)
    gc.disable()
    try:
        encoder_outputs = loop.encoder_outputs * 1
        memory = loop.attention.memory(encoder_outputs)
        gone = weakref.ref(encoder_outputs), weakref.ref(memory)
        outputs = loop.steps(memory)
        loss = loss_of(outputs)
        if ending == "raises":

            def fail(_: Tensor) -> None:
                raise KeyError

            outputs[2][0].register_hook(fail)
            with pytest.raises(KeyError):
                loss.backward()
        elif ending != "never":
            loss.backward(retain_graph=ending == "retained")
        del encoder_outputs, memory, outputs, loss
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.fused
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
@pytest.mark.parametrize("name", ["dot", "general", "concat"])
def test_resident_size_is_flat(name: str) -> None:
    """Over training steps, some of whose backwards are partial: a megabyte left behind by each would be 100."""
    torch.manual_seed(0)
    attention = LuongAttention(name, 64)
    encoder_outputs = torch.randn(16, 256, 64).requires_grad_()  # 1 MiB
    hidden = torch.randn(16, 64).requires_grad_()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def train(i: int) -> None:
        memory = attention.memory(encoder_outputs * 1)
        state = hidden
        for _ in range(5):
            state = torch.tanh(state + attention(state, memory)[0])
        torch.autograd.grad(state.sum(), [hidden] if i % 3 == 0 else [hidden, encoder_outputs])

    for i in range(20):
        train(i)
    before = resident()
    for i in range(100):
        train(i)
    assert resident() - before < 20 << 20


@pytest.mark.fused
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dot", "general", "concat"])
def test_steps_on_streams_of_their_own(name: str) -> None:
    """The memory's gradient waits for the steps' backwards, each on the stream of its step, which are late."""
    torch.manual_seed(0)
    attention = LuongAttention(name, 64, device="cuda")
    encoder_outputs = torch.randn(4, 50, 64, device="cuda").requires_grad_()
    hidden = torch.randn(3, 4, 64, device="cuda")

    def gradients(streams: list[torch.cuda.Stream]) -> tuple[Tensor, ...]:
        memory = attention.memory(encoder_outputs * 1)
        own = torch.cuda.current_stream()
        losses = []
        for state, stream in zip(hidden, streams, strict=True):
            stream.wait_stream(own)
            with torch.cuda.stream(stream):
                losses.append(attention(state, memory)[0].square().sum())
        for stream in streams:
            own.wait_stream(stream)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
        return torch.autograd.grad(sum(losses), [encoder_outputs, *attention.parameters()])

    expected = gradients([torch.cuda.current_stream()] * 3)
    torch.testing.assert_close(gradients([torch.cuda.Stream() for _ in range(3)]), expected)


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_a_subclass_for_a_memory(method: str, each_backend: str) -> None:
    class Features(Tensor):
        pass

    module = LuongAttention(method, 6)
    query, memory = torch.randn(2, 6), torch.randn(2, 5, 6)
    expected = torch.autograd.grad(module(query, memory.requires_grad_())[0].sum(), memory)[0]
    features = memory.detach().as_subclass(Features).requires_grad_()
    context, _ = module(query, module.memory(features))
    context.sum().backward()
    torch.testing.assert_close(features.grad.as_subclass(Tensor), expected)
