"""PyTorch's modes: autocast, inference, meta tensors, torch.compile, torch.func, the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import attn_ext
from tests import cases
from tests.cases import METHODS, Case, Problem, assert_accurate, assert_same

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, dtype: torch.dtype, each_backend: str) -> None:
    """What rounding the inputs gives; gradients come back in the inputs' own dtype."""
    problem = Case(method, T=5, S=37, D=20, masking="lengths").problem()
    rounded = problem.to(dtype)
    under_autocast = replace(
        problem, function=torch.autocast(cases.DEVICE, dtype)(problem.function), grad_outputs=rounded.grad_outputs
    )
    expected = rounded.results()
    for name, result in under_autocast.results().items():
        assert result.dtype == (torch.float32 if name.startswith("grad") else dtype)
        torch.testing.assert_close(result, expected[name].to(result.dtype))


def test_autocast_takes_mixed_inputs(each_backend: str) -> None:
    """A float32 memory meets a bfloat16 hidden state, as after a layer that autocast ran."""
    problem = Case("general").problem()
    tensors = problem.tensors | {"query": problem.tensors["query"].bfloat16()}
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        assert problem.function(**tensors)[0].dtype == torch.bfloat16


def test_autocast_leaves_float64(each_backend: str) -> None:
    problem = Case("concat", dtype=torch.float64).problem()
    under_autocast = replace(problem, function=torch.autocast(cases.DEVICE, torch.bfloat16)(problem.function))
    assert_same(under_autocast.results(), problem.results())


@pytest.mark.fused
@pytest.mark.parametrize("method", METHODS)
def test_second_derivative_within_autocast(method: str) -> None:
    """The block that a backward runs in has no say in its products: those of the call had theirs."""
    problem = Case(method, T=5, S=37, D=20).problem()
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}

    def derivatives(during_backward: AbstractContextManager[object]) -> list[Tensor]:
        context, _ = problem.function(**leaves, **problem.options)
        with during_backward:
            first = torch.autograd.grad(context.sin().sum(), leaves.values(), create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        return [*first, *torch.autograd.grad(penalty, leaves.values())]

    actual = derivatives(torch.autocast(cases.DEVICE, torch.bfloat16))
    assert all(map(torch.equal, actual, derivatives(nullcontext())))


class _Watch(TorchFunctionMode):
    """Notes what it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Watched(Tensor):
    """Notes what it takes part in."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.fused
@pytest.mark.parametrize("call", [*METHODS, "step"])
def test_overrides_see_the_op(call: str) -> None:
    """__torch_function__, of a mode or of a tensor's class, is asked about the ops as about PyTorch's own."""
    problem = Case("dot" if call == "step" else call, S=37).problem()
    op = {"step": "memory_attention", "dot": "attention", "additive": "attention"}.get(call, "projected_attention")
    memory = "values" if call == "additive" else "memory"

    def results(**tensors: Tensor) -> tuple[Tensor, ...]:
        if call == "step":
            return attn_ext.AttentionMemory(tensors["memory"]).attend(tensors["query"])
        return problem.function(**tensors)

    expected = results(**problem.tensors)
    with _Watch() as mode:
        assert all(map(torch.equal, results(**problem.tensors), expected))
    assert f"attn_ext.{op}.default" in mode.seen
    for name in ("query", memory):
        _Watched.seen.clear()
        watched = problem.tensors | {name: problem.tensors[name].as_subclass(_Watched)}
        assert all(map(torch.equal, results(**watched), expected))
        assert f"attn_ext.{op}.default" in _Watched.seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_without_a_graph(method: str, mode: Callable[[], object], each_backend: str) -> None:
    problem = Case(method, T=5, S=37, D=20, masking="lengths+pairs").problem()
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}
    expected = problem.function(**leaves, **problem.options)
    assert all(output.requires_grad for output in expected)
    with mode():
        outputs = problem.function(**leaves, **problem.options)
    assert not any(output.requires_grad for output in outputs)
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("method", METHODS)
def test_meta(method: str, each_backend: str) -> None:
    """Shapes and dtypes without data, for whoever plans with them."""
    problem = Case(method, dtype=torch.bfloat16, masking="rows").problem()
    problem.options["mask"] = problem.options["mask"].to("meta")
    on_meta = problem.with_tensors(**{name: tensor.to("meta") for name, tensor in problem.tensors.items()})
    on_meta.grad_outputs.update({name: grad.to("meta") for name, grad in problem.grad_outputs.items()})
    expected = Case(method, dtype=torch.bfloat16, masking="rows").problem().results()
    for name, result in on_meta.results().items():
        assert (result.device.type, result.shape, result.dtype) == ("meta", expected[name].shape, torch.bfloat16), name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("method", METHODS)
def test_compile(method: str, dynamic: bool, each_backend: str) -> None:
    """One graph, forward and backward, of the numbers without it; the shapes may be left open."""
    problem = Case(method, masking="lengths+rows").problem()
    compiled = replace(
        problem, function=torch.compile(problem.function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    )
    torch._dynamo.reset()
    torch.testing.assert_close(compiled.results(), problem.results())


def test_compile_of_a_decoder_step(each_backend: str) -> None:
    module = attn_ext.LuongAttention("concat", 4, 6)
    hidden, encoder_outputs = torch.randn(2, 4), torch.randn(2, 5, 6)

    def step(hidden: Tensor, encoder_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        return module(hidden, module.memory(encoder_outputs))

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, encoder_outputs), step(hidden, encoder_outputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["general", "concat"])
def test_jit_trace(method: str, each_backend: str) -> None:
    module = attn_ext.LuongAttention(method, 6)
    inputs = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    module(*inputs)

    def attend(query: Tensor, memory: Tensor) -> Tensor:
        return module(query, memory)[0]

    with pytest.raises(RuntimeError, match="requires grad as a constant"):  # the tracer's own; nothing else is tried
        torch.jit.trace(attend, inputs)
    module.requires_grad_(False)
    traced = torch.jit.trace(attend, inputs)
    others = torch.randn(4, 7, 6), torch.randn(4, 9, 6)
    torch.testing.assert_close(traced(*others), attend(*others))


@pytest.mark.fused
def test_transforms_that_are_not_there_say_so() -> None:
    """Derivatives that PyTorch would take by other means than autograd's backward: refused, never left out."""
    problem = Case("dot").problem()
    query, memory = problem.tensors.values()

    def context(query: Tensor) -> Tensor:
        return attn_ext.dot_attention(query, memory)[0]

    def of_dual(query: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            return context(torch.autograd.forward_ad.make_dual(query, query))

    transforms: list[Callable[[Tensor], object]] = [
        torch.func.grad(lambda query: context(query).sum()),
        torch.func.jacrev(context),
        lambda query: torch.vmap(context)(query.unsqueeze(0)),
        lambda query: torch.func.jvp(context, (query,), (query,)),
        of_dual,
    ]
    for transform in transforms:
        with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
            transform(query)


@pytest.mark.fused
def test_what_is_wrong_within_a_transform_is_what_is_said() -> None:
    query, memory = Case("dot").problem().tensors.values()
    attend = partial(attn_ext.dot_attention, memory=memory, lengths=[9, 9])
    with pytest.raises(ValueError, match="lengths go from 9 to 9"):
        torch.func.jacrev(attend)(query)


@pytest.mark.fused
def test_steps_over_a_memory_from_outside_of_a_transform_say_so() -> None:
    query, memory = Case("general").problem().tensors["query"], Case("general").problem().tensors["memory"]
    module = attn_ext.LuongAttention("general", query.shape[-1], memory.shape[-1])
    made = module.memory(memory)
    with pytest.raises(RuntimeError, match="with a memory made there"):
        torch.func.grad(lambda query: module(query, made)[0].sum())(query)
    with pytest.raises(RuntimeError, match="with a memory made there"):
        torch.func.grad(lambda memory: module(query, module.memory(memory))[0].sum())(memory)


@pytest.mark.parametrize("name", ["query", "memory", "weight", "v"])
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_a_memory_made_within_vmap(method: str, name: str, each_backend: str) -> None:
    """Without a gradient it works; one that it would lose is refused, whatever has it."""
    tensors = Case(method).problem().tensors
    if name not in tensors:
        pytest.skip(f"{method} has no {name}")
    several = {key: torch.stack([tensor, 0.5 * tensor]) for key, tensor in tensors.items()}
    leaf = several[name].requires_grad_()

    def context(given: dict[str, Tensor]) -> Tensor:
        query = given.pop("query")
        return attn_ext.AttentionMemory(method=method, **given).attend(query)[0]

    expected = torch.stack([context({key: tensor[i] for key, tensor in several.items()}) for i in range(2)])
    is_refused = each_backend == "fused"
    with pytest.raises(RuntimeError, match="use_backend") if is_refused else nullcontext():
        torch.autograd.grad(torch.vmap(context)(several).sum(), leaf)
    if each_backend == "reference" or method != "dot":
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(context)(several), expected)


def test_compiled_with_numbers_of_numpy(each_backend: str) -> None:
    numpy = pytest.importorskip("numpy")
    query, memory, lengths = torch.randn(2, 3, 4), torch.randn(2, 5, 4), numpy.array([5, 2])

    def attend(query: Tensor, memory: Tensor, lengths: object) -> tuple[Tensor, Tensor | None]:
        return attn_ext.luong_attention(query, memory, lengths=lengths, scale=1 / numpy.sqrt(query.shape[-1]))

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, memory, lengths), attend(query, memory, lengths))


def test_compiled_with_a_list_of_lengths_out_of_range(each_backend: str) -> None:
    """It is known then what it holds."""
    query, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: attn_ext.luong_attention(query, memory, lengths=[6, 2]), backend="eager")
    with pytest.raises(ValueError, match="lengths go from 2 to 6, needed is 0 <= length <= S=5"):
        compiled()


def test_compiled_with_lengths_on_the_cpu(each_backend: str) -> None:
    """Where all else is on another device."""
    query, memory = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 5, 4, device="meta")
    lengths = torch.tensor([5, 2], device="cpu")
    attend = torch.compile(
        lambda query, memory, lengths: attn_ext.luong_attention(query, memory, lengths=lengths),
        fullgraph=True,
        backend="eager",
    )
    context, weights = attend(query, memory, lengths)
    assert context.shape == (2, 3, 4)
    assert weights.shape == (2, 3, 5)


@pytest.mark.fused
@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("method", ["general", "concat"])
def test_a_weight_that_python_makes_of_others(method: str, with_memory: bool) -> None:
    """Its gradient would be a plain tensor."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    module = attn_ext.LuongAttention(method, 4)
    plain = module.Wa.weight.detach()
    module.Wa.weight = torch.nn.Parameter(two_tensor(plain, 2 * plain))
    query, encoder_outputs = torch.randn(2, 4), torch.randn(2, 5, 4)

    def call() -> Tensor:
        return module(query, module.memory(encoder_outputs) if with_memory else encoder_outputs)[0]

    with pytest.raises(TypeError, match="weight is a TwoTensor"):
        call()
    with attn_ext.use_backend("reference"):
        call().sum().backward()
    assert isinstance(module.Wa.weight.grad, two_tensor)


@pytest.mark.fused
@pytest.mark.parametrize("name", ["query", "memory", "weight", "v"])
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_forward_mode_through_a_memory_says_so(method: str, name: str) -> None:
    """Whatever has the tangent: below autograd it would be left out."""
    tensors = Case(method).problem().tensors
    if name not in tensors:
        pytest.skip(f"{method} has no {name}")

    def context(value: Tensor) -> Tensor:
        memory = attn_ext.AttentionMemory(method=method, **{n: t for n, t in given(value).items() if n != "query"})
        return memory.attend(given(value)["query"])[0]

    def given(value: Tensor) -> dict[str, Tensor]:
        return tensors | {name: value}

    value = tensors[name]
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(context, (value,), (value,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        context(torch.autograd.forward_ad.make_dual(value, value))
    with attn_ext.use_backend("reference"):
        torch.func.jvp(context, (value,), (value,))


def test_transforms_in_the_reference() -> None:
    """Where they are: forward and reverse mode agree, and a batch of calls is the calls."""
    problem = Case("dot", dtype=torch.float64).problem()
    query, memory = problem.tensors.values()

    def context(query: Tensor, memory: Tensor) -> Tensor:
        return attn_ext.dot_attention(query, memory, lengths=[5, 2])[0]

    with attn_ext.use_backend("reference"):
        forward, reverse = (mode(context)(query, memory) for mode in (torch.func.jacfwd, torch.func.jacrev))
        torch.testing.assert_close(forward, reverse)
        queries, memories = torch.stack([query, -query]), torch.stack([memory, 2 * memory])
        expected = torch.stack([context(*pair) for pair in zip(queries, memories, strict=True)])
        torch.testing.assert_close(torch.vmap(context)(queries, memories), expected)


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
@pytest.mark.parametrize("T", [1, 3], ids="T={}".format)
def test_gradients_in_batches(method: str, T: int, each_backend: str) -> None:
    """Several gradients of one result at once, which PyTorch maps over: those of a loop's memory too."""
    tensors = Case(method, T=T, dtype=torch.float64).problem().tensors
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    options = {name: tensor for name, tensor in leaves.items() if name not in ("query", "memory")}
    memory = attn_ext.AttentionMemory(leaves["memory"], method, **options)
    is_refused = each_backend == "fused" and method != "dot"
    for context in (
        attn_ext.luong_attention(leaves["query"], leaves["memory"], method, **options)[0],
        memory.attend(leaves["query"])[0],
        *([] if memory.keys is None else [memory.keys * 2 + leaves["query"].sum() + leaves["v"].sum()]),
    ):
        vectors = torch.randn(3, *context.shape, dtype=torch.float64)
        inputs = list(leaves.values())
        with pytest.raises(NotImplementedError, match="use_backend") if is_refused else nullcontext():
            batch = torch.autograd.grad(context, inputs, vectors, is_grads_batched=True, retain_graph=True)
        if is_refused:
            continue
        each = [torch.autograd.grad(context, inputs, vector, retain_graph=True) for vector in vectors]
        torch.testing.assert_close(batch, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_export(method: str, each_backend: str) -> None:
    """One program for all batches and lengths."""
    module = attn_ext.LuongAttention(method, 4)
    B, T, S = (torch.export.Dim(name) for name in "BTS")
    program = torch.export.export(
        module,
        (torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.tensor([5, 2])),
        dynamic_shapes={"hidden": {0: B, 1: T}, "encoder_outputs": {0: B, 1: S}, "lengths": {0: B}},
    )
    arguments = torch.randn(3, 7, 4), torch.randn(3, 9, 4), torch.tensor([1, 9, 0])
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


THREADED = [
    Case("dot", B=3, T=70, S=65, D=100, masking="lengths+rows"),
    Case("additive", B=3, T=70, S=65, D=100, masking="lengths+rows"),
    # fewer rows than threads: the source axis is split
    Case("dot", B=1, T=1, S=20011, D=64, masking="rows"),
    Case("additive", B=1, T=1, S=20011, D=64, masking="rows"),
    Case("dot", B=1, T=5, S=4099, D=17),
    Case("additive", B=1, T=5, S=4099, D=17),
    Case("dot", B=1, T=1, S=20011, D=64, dtype=torch.bfloat16),
    Case("concat", B=1, T=1, S=1000, D=33, masking="lengths"),
    # no multiple of the threads: the source is split, or the queries are divided
    Case("dot", B=4, T=40, S=600, D=64, masking="lengths"),
    Case("additive", B=4, T=40, S=600, D=64, masking="lengths"),
    Case("dot", B=5, T=40, S=30, D=512, masking="lengths"),
    Case("additive", B=5, T=40, S=30, D=512, masking="lengths"),
]


def results_with(threads: int, problem: Problem) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return problem.results()


@pytest.mark.cpu
@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_number_of_threads(threads: int, case: Case, each_backend: str) -> None:
    """One number of threads gives one result, bit by bit; another changes only the order of sums."""
    problem = case.problem()
    results = results_with(threads, problem)
    for _ in range(3):
        assert_same(results_with(threads, problem), results)
    for name, alone in results_with(1, problem).items():
        # Of sums of 13650 terms, as v's gradient is, an element can be small where its terms were not.
        rounding = 1e-5 if alone.dtype == torch.float32 else 2 * torch.finfo(alone.dtype).eps
        torch.testing.assert_close(results[name], alone, rtol=0, atol=rounding * alone.abs().max().item(), msg=name)


# One batch element, a tile of steps, and every kind of gradient that is merged: of the output's type or another, with
# gaps and without, its rows whole vectors or not. The last has two tiles or three, so that both axes may be divided.
DIVIDED = [
    Case(op, B=1, T=T, S=S, D=D, Dm=Dm, dtype=dtype, masking=masking, loss=loss)
    for op in ("dot", "additive")
    for T, S, D, Dm, dtype, masking, loss in [
        (300, 24, 128, 64, torch.float32, "none", "context"),
        (700, 1, 512, 512, torch.float32, "none", "both"),
        (300, 33, 100, 70, torch.float64, "pairs", "both"),
        (300, 40, 80, 64, torch.bfloat16, "lengths+rows", "both"),
        (150, 60, 112, 64, torch.float32, "rows", "no_weights"),
        (150, 150, 64, 48, torch.float32, "pairs", "weights"),
    ]
]


@pytest.mark.cpu
@pytest.mark.fused
@pytest.mark.numerics
@pytest.mark.parametrize("case", DIVIDED, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_queries_divided_among_threads(threads: int, case: Case) -> None:
    """Gradients of memory and keys are merged: no less exact, the same bits every time, not those of undivided sums."""
    problem = case.problem()
    undivided = results_with(1, problem)
    results = results_with(threads, problem)
    for _ in range(3):
        assert_same(results_with(threads, problem), results)
    assert_accurate(problem)
    if 1 < case.S < 100 and case.dtype != torch.bfloat16:  # whose bits are too few to tell
        name = "grad memory" if case.method == "dot" else "grad keys"
        assert not torch.equal(results[name], undivided[name])
