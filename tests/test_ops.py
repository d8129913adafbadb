"""torch.ops.attn_ext.*, called directly: what PyTorch asks of an op, which kernel runs, and unchecked input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tests import cases
from tests.cases import DTYPES, LOSSES, Case, Problem, short, spoiled

pytestmark = pytest.mark.fused

SCORES = ("dot", "keyed_dot", "additive")


def op(direction: str) -> Any:
    name = "attention" if direction == "forward" else "attention_backward"
    return getattr(torch.ops.attn_ext, name).default


def tensors_of(method: str, problem: Problem) -> list[Tensor | None]:
    """Query, memory, keys, v and prepared keys."""
    of = problem.tensors
    keys = of.get("keys")
    prepared = torch.ops.attn_ext.prepare_keys(keys) if method == "prepared additive" else None
    return [of["query"], of["memory"] if keys is None else of["values"], keys, of.get("v"), prepared]


def gradients_of(method: str) -> list[bool]:
    """Which of query, memory, keys, v and the scores there are, and so have a gradient."""
    return [True, True, method != "dot", "additive" in method, True]


def arguments(method: str, direction: str, *sizes: int, **fields: Any) -> tuple[Any, ...]:
    """Valid ones of a Case of these `sizes` and `fields`: for the backward op, with what the forward op returned."""
    case = Case(method.removeprefix("prepared "), *sizes, **fields)
    problem = case.problem()
    tensors = tensors_of(method, problem)
    options = [problem.options["lengths"], problem.options["mask"], 1.0 if case.scale is None else case.scale]
    need_weights = problem.options["need_weights"]
    if direction == "forward":
        return (*tensors, *options, need_weights, [case.loss == "both", case.loss != "no_weights"])
    context, weights, logsumexp = exact(op("forward")(*tensors, *options, need_weights, [True, True]))
    grads = [problem.grad_outputs.get(name) for name in ("context", "weights")]
    wanted = gradients_of(method)
    return (*grads, *tensors, *options, context, weights if need_weights else None, logsumexp, wanted)


def exact(outputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a forward's results, context and weights as they were accumulated, and the log-sum-exp."""
    context, weights, logsumexp, unrounded = outputs
    return (*(unrounded or (context, weights)), logsumexp)


@pytest.fixture(params=[*SCORES, "prepared additive"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


each_score = pytest.mark.parametrize("score", SCORES)


@pytest.fixture(params=["forward", "backward"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("direction", "loss"),
    [("forward", "both"), ("forward", "no_weights"), *(("backward", loss) for loss in LOSSES)],
)
@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
def test_opcheck(method: str, direction: str, masking: str, loss: str) -> None:
    opcheck(op(direction), arguments(method, direction, masking=masking, loss=loss, scale=0.5))


@pytest.mark.parametrize(
    "sizes", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (1, 1, 1, 1), (1, 70, 40, 33)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=short)
def test_opcheck_of_sizes(method: str, direction: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    opcheck(op(direction), arguments(method, direction, *sizes, dtype=dtype, masking="lengths"))


@pytest.mark.parametrize("wanted", ["none", "the query's", "the memory's", "the query's and the scores'"])
def test_opcheck_of_wanted_gradients(method: str, wanted: str) -> None:
    *others, _ = arguments(method, "backward", masking="rows")
    some = ["query" in wanted, "memory" in wanted, False, False, "scores" in wanted]
    opcheck(op("backward"), (*others, some))
    assert [grad.numel() > 0 for grad in op("backward")(*others, some)] == some


def test_opcheck_of_strides(method: str, direction: str) -> None:
    views = tuple(
        a.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(a, Tensor) and a.dim() == 3 else a
        for a in arguments(method, direction, masking="pairs")
    )
    opcheck(op(direction), views)


@pytest.mark.parametrize("loss", ["both", "no_weights"])
@pytest.mark.parametrize("masking", ["none", "lengths+pairs"])
def test_opcheck_with_gradients(method: str, masking: str, loss: str) -> None:
    """The op is differentiable by itself, also where torch.compile traces both passes."""
    *tensors, lengths, mask, scale, need_weights, _ = arguments(method, "forward", masking=masking, loss=loss)
    leaves = [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors[:4]]
    leaves += tensors[4:]
    opcheck(op("forward"), (*leaves, lengths, mask, scale, need_weights, [False, False]))


@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
def test_one_step_without_its_dimension(method: str, masking: str) -> None:
    """A query [B, D] gives what [B, 1, D] gives, to the bit, in every tensor; and a mask may have the 1 or not."""
    for direction in ("forward", "backward"):
        with_dimension = arguments(method, direction, T=1, S=37, D=20, masking=masking)
        per_query = {"query", "grad_context", "grad_weights", "context", "weights", "logsumexp"}
        names = [argument.name for argument in op(direction)._schema.arguments]
        without = [
            a.squeeze(1) if name in per_query and isinstance(a, Tensor) else a
            for name, a in zip(names, with_dimension, strict=True)
        ]
        opcheck(op(direction), tuple(without))
        results, expected = (op(direction)(*args) for args in (without, with_dimension))
        for name, result, other in zip(op(direction)._schema.returns, results, expected, strict=True):
            one_step = direction == "forward" or name.name in ("grad_query", "grad_scores")
            if name.name == "exact":
                assert result == other == []
            else:
                assert torch.equal(result, other.squeeze(1) if one_step else other), name


@pytest.mark.parametrize("masking", ["none", "lengths+pairs"])
@pytest.mark.parametrize("one_step", [False, True], ids=["[B, T, D]", "[B, D]"])
@each_score
def test_derivatives_of_the_op(score: str, masking: str, one_step: bool) -> None:
    """First and second, with no Python function around it; the log-sum-exp has none."""
    sizes = {"T": 1 if one_step else 2, "S": 4, "D": 3, "Dm": 2}
    query, *others = arguments(score, "forward", **sizes, dtype=torch.float64, masking=masking)
    tensors = [query[:, 0] if one_step else query, *others[:3]]
    inputs = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    options = [*[None] * (4 - len(inputs)), *others[3:]]

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        context, weights, logsumexp, _ = op("forward")(*inputs, *options)
        assert not logsumexp.requires_grad
        return context, weights

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.numerics
@pytest.mark.parametrize("masking", ["none", "lengths", "rows", "pairs"])
@pytest.mark.parametrize(("T", "S"), [(1, 37), (1, 2100), (5, 300), (12, 300), (70, 37), (130, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_halves_are_rounded_where_they_are_written(
    method: str, dtype: torch.dtype, T: int, S: int, masking: str
) -> None:
    """From what float32 accumulates, which comes with them where it is asked for; to the same bits either way.

    But a CPU's context of rounded weights over several tiles, which is not as exact where no backward is to read it.
    """
    *tensors, lengths, mask, scale, _, _ = arguments(
        method, "forward", B=2, T=T, S=S, D=40, dtype=dtype, masking=masking
    )
    wider = [tensor if tensor is None else tensor.float() for tensor in tensors]
    wide = op("forward")(*wider, lengths, mask, scale, True, [True, True])
    *rounded, logsumexp, unrounded = op("forward")(*tensors, lengths, mask, scale, True, [True, True])
    assert wide[3] == []
    assert logsumexp.dtype == torch.float32
    # Products of halves take the context from rounded weights.
    on_gpu = cases.KERNELS == "cuda"
    if on_gpu:
        from_rounded = T > 1 or method == "keyed_dot"
    else:
        capability = torch.ops.attn_ext.cpu_capability()
        has_pairs = dtype == torch.bfloat16 and capability in ("avx512_bf16", "avx512_amx")
        fewest = 16 if capability == "avx512_amx" else 8
        from_rounded = has_pairs and fewest <= T
    tolerance = {"rtol": 1e-5, "atol": 1e-5 if on_gpu else 1e-6}
    # By matrix tiles, sixteen bits of each number.
    if not on_gpu and capability == "avx512_amx" and T >= 16:
        tolerance = {"rtol": 2**-14, "atol": 2**-15}
    of_context = {"rtol": 2**-8, "atol": 2**-8} if from_rounded else tolerance
    tolerances = (of_context, tolerance)
    for result, exact, truth, tolerance in zip(rounded, unrounded, wide, tolerances, strict=False):
        assert exact.dtype == torch.float32
        assert torch.equal(result, exact.to(dtype))
        torch.testing.assert_close(exact, truth, **tolerance)
    for need_weights in (True, False):
        for need_exact in itertools.product((True, False), repeat=2):
            context, weights, _, some = op("forward")(*tensors, lengths, mask, scale, need_weights, need_exact)
            if from_rounded and not on_gpu and S > 256 and not need_exact[0]:  # several tiles
                torch.testing.assert_close(context, rounded[0], rtol=2**-7, atol=2**-8)
            else:
                assert torch.equal(context, rounded[0])
            assert torch.equal(weights, rounded[1]) if need_weights else weights.numel() == 0
            assert len(some) == (2 if any(need_exact) else 0)
            for tensor, exact, wanted in zip(
                some, unrounded, (need_exact[0], need_exact[1] and need_weights), strict=False
            ):
                assert torch.equal(tensor, exact) if wanted else tensor.numel() == 0


def test_halves_are_differentiated_as_they_were_accumulated(method: str) -> None:
    """The gradients are those of the float32 results, rounded once."""
    fields = {"S": 37, "D": 20, "dtype": torch.bfloat16}
    *tensors, prepared, lengths, mask, scale, need_weights, _ = arguments(method, "forward", **fields)
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    options = (prepared, lengths, mask, scale, need_weights, [False, False])
    context, weights, *_ = op("forward")(*leaves, *[None] * (4 - len(leaves)), *options)
    grads = [torch.randn_like(context), torch.randn_like(weights)]
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    first = torch.autograd.grad((context, weights), leaves, grads, retain_graph=True)
    again = torch.autograd.grad((context, weights), leaves, grads, create_graph=True)
    assert {grad.dtype for grad in (*first, *again)} == {torch.bfloat16}
    # A GPU's products take halves: the gradients are as good as these, not as float32.
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if cases.KERNELS == "cuda" else {}
    torch.testing.assert_close(first, tuple(grad.detach() for grad in again), **tolerance)


def ranges(call: Callable[[], object]) -> set[str]:
    """The ops' ranges that a call records under the profiler; not those of the projections (test_projections.py)."""
    with torch.autograd.profiler.profile() as profile:
        call()
    names = {event.name for event in profile.function_events}
    return {name for name in names if name.startswith(("attn_ext::cpu::", "attn_ext::cuda::")) and "matmul" not in name}


@pytest.mark.parametrize("T", [1, 5, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("function", ["dot", "keyed_dot", "general", "additive", "concat"])
def test_the_fused_kernels_run(function: str, dtype: torch.dtype, T: int) -> None:
    """By name: the forward kernel, and with gradients the backward kernel; none under "reference"."""
    problem = Case(function, T=T, S=77, D=20, dtype=dtype, masking="lengths").problem()
    score = {"general": "dot", "concat": "additive"}.get(function, function)
    capability = f"[{torch.ops.attn_ext.cpu_capability()}]" if cases.KERNELS == "cpu" else ""
    forward, backward = (
        f"attn_ext::{cases.KERNELS}::{score}_attention_{d}{capability}" for d in ("forward", "backward")
    )
    assert ranges(lambda: problem.function(**problem.tensors, **problem.options)) == {forward}
    assert ranges(problem.results) == {forward, backward}
    assert ranges(problem.reference_results) == set()


@each_score
def test_the_reference_differentiates_twice(score: str) -> None:
    """create_graph=True is the one backward pass that the compiled op leaves to the reference."""
    problem = Case(score).problem()
    query = problem.tensors["query"].requires_grad_()
    context, _ = problem.function(**problem.tensors)
    assert ranges(lambda: torch.autograd.grad(context.sum(), query, create_graph=True)) == set()


# Each size here is told by at least two arguments, but for this: the size of a memory with keys in the forward pass.
FREE = {
    (method, "forward", "memory", f"size {size} in dim 2")
    for method in ("keyed_dot", "additive", "prepared additive")
    for size in (5, 7)
}


def test_nothing_crashes(method: str, direction: str) -> None:
    """Every tensor argument spoiled in every way, the rest valid: an exception, never a crash or a result."""
    valid = arguments(method, direction, masking="lengths+pairs")
    names = [argument.name for argument in op(direction)._schema.arguments]
    accepted = []
    for position, argument in enumerate(valid):
        if not isinstance(argument, Tensor):
            continue
        for what, wrong in spoiled(argument):
            try:
                op(direction)(*valid[:position], wrong, *valid[position + 1 :])
            except (RuntimeError, ValueError, TypeError):
                continue
            accepted.append((method, direction, names[position], what))
    assert set(accepted) <= FREE


def test_keys_without_a_v_and_the_like() -> None:
    """Of the tensors that go together all come, or none."""
    *with_keys, prepared, lengths, mask, scale, need_weights, need_exact = arguments("prepared additive", "forward")
    query, memory, keys, v = with_keys
    options = (lengths, mask, scale, need_weights, need_exact)
    with pytest.raises(ValueError, match=r"^v came without keys"):
        op("forward")(query, memory, None, v, None, *options)
    with pytest.raises(ValueError, match=r"^prepared_keys came without v"):
        op("forward")(query, memory, keys, None, prepared, *options)


@pytest.mark.cpu
@pytest.mark.parametrize("lengths", [[6, 2], [-1, 2], [2**62, -(2**62)]], ids=str)
def test_lengths_out_of_range(method: str, direction: str, lengths: list[int]) -> None:
    """Nothing before the memory or beyond S is read."""
    valid = arguments(method, direction, masking="lengths")
    position = next(i for i, a in enumerate(valid) if isinstance(a, Tensor) and a.dtype == torch.int64)
    text = rf"^lengths\[0\] is {lengths[0]}, needed is 0 <= length <= S=5$"
    with pytest.raises(ValueError, match=text):
        op(direction)(*valid[:position], torch.tensor(lengths), *valid[position + 1 :])
    wider = torch.tensor([[lengths[0], 0], [lengths[1], 0]])[:, 0]
    with pytest.raises(ValueError, match=text):
        op(direction)(*valid[:position], wider, *valid[position + 1 :])


def test_tensors_on_two_devices(method: str, direction: str) -> None:
    """A meta tensor has no data to read."""
    valid = arguments(method, direction, masking="lengths+rows")
    for position, argument in enumerate(valid):
        if isinstance(argument, Tensor):
            try:
                outputs = op(direction)(*valid[:position], argument.to("meta"), *valid[position + 1 :])
            except (RuntimeError, ValueError):
                continue
            assert all(output.is_meta for output in outputs)


@pytest.mark.parametrize("scale", [0.0, 1e30, -1e300], ids=str)
@each_score
def test_any_scale(score: str, scale: float) -> None:
    """Numbers without a meaning give numbers without a meaning, in both directions, and no crash."""
    problem = Case(score, S=70, masking="lengths", scale=scale).problem()
    assert problem.results()["context"].shape == (2, 3, problem.grad_outputs["context"].shape[-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
@each_score
def test_any_values(score: str, value: float) -> None:
    """NaN, infinity or almost that in one batch element spreads to no other."""
    problem = Case(score, B=2, T=5, S=70, D=20).problem()
    clean = problem.results()
    for name, tensor in problem.tensors.items():
        if tensor.dim() == 3:
            spoiled_tensor = tensor.clone()
            spoiled_tensor[0, 0, 0] = value
            results = problem.with_tensors(**{name: spoiled_tensor}).results()
            for output in ("context", "weights"):
                assert torch.equal(results[output][1], clean[output][1]), (name, output)


@pytest.mark.parametrize(("T", "S"), [(1, 30), (5, 30), (70, 30), (5, 300), (70, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_context_that_is_missing(method: str, dtype: torch.dtype, T: int, S: int) -> None:
    """A backward that would read it says so; of the others it changes no bit."""
    *others, context, weights, logsumexp, wanted = arguments(method, "backward", T=T, S=S, D=20, dtype=dtype)
    one_query = T == 1 and method != "keyed_dot"
    if S > 256 if cases.KERNELS == "cpu" else one_query:
        with pytest.raises(ValueError, match="context is missing"):
            op("backward")(*others, None, weights, logsumexp, wanted)
        return
    without, given = (op("backward")(*others, some, weights, logsumexp, wanted) for some in (None, context))
    assert all(map(torch.equal, without, given))
    opcheck(op("backward"), (*others, None, weights, logsumexp, wanted))


def test_wrong_number_of_wanted_gradients(method: str) -> None:
    *others, wanted = arguments(method, "backward")
    for wrong in ([], wanted[1:], [*wanted, True]):
        with pytest.raises((RuntimeError, TypeError)):
            op("backward")(*others, wrong)


def test_no_gradient_comes_back(method: str) -> None:
    """Neither through the context nor through the weights: refused or zeros, never what memory happened to hold."""
    valid = arguments(method, "backward")
    try:
        grads = op("backward")(None, None, *valid[2:])
    except (RuntimeError, ValueError):
        return
    assert all((grad == 0).all() for grad in grads)


# Attention with its projections: general by its queries, by its keys, and concat.

each_projection = pytest.mark.parametrize("projection", ["general", "general by keys", "concat"])


def projected_arguments(projection: str, case: Case) -> tuple[Any, ...]:
    problem = case.problem()
    tensors = [problem.tensors.get(name) for name in ("query", "weight", "memory", "v", "bias")]
    options = [problem.options["lengths"], problem.options["mask"], 0.5, problem.options["need_weights"]]
    return (*tensors, *options, projection == "general by keys")


@each_projection
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
@pytest.mark.parametrize("gradients", [False, True], ids=["", "with gradients"])
def test_opcheck_of_projections(projection: str, gradients: bool, masking: str, dtype: torch.dtype) -> None:
    *tensors, lengths, mask, scale, need_weights, by_keys = projected_arguments(
        projection, Case(projection.split()[0], masking=masking, dtype=dtype)
    )
    leaves = [tensor if tensor is None else tensor.requires_grad_(gradients) for tensor in tensors]
    if dtype == torch.float16:
        # PyTorch's products, which a trace has: sums in another order may be rounded to the halves beside.
        torch.set_float32_matmul_precision("medium")
    opcheck(torch.ops.attn_ext.projected_attention.default, (*leaves, lengths, mask, scale, need_weights, by_keys))


@each_projection
@pytest.mark.parametrize(
    "sizes", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (1, 1, 1, 1), (1, 70, 40, 33)], ids=str
)
def test_opcheck_of_sizes_of_projections(projection: str, sizes: tuple[int, ...]) -> None:
    case = Case(projection.split()[0], *sizes, masking="lengths")
    opcheck(torch.ops.attn_ext.projected_attention.default, projected_arguments(projection, case))


@each_projection
def test_nothing_crashes_in_a_projection(projection: str) -> None:
    """As for the ops beneath."""
    valid = projected_arguments(projection, Case(projection.split()[0], masking="lengths+pairs"))
    accepted = set()
    for position, argument in enumerate(valid):
        for what, wrong in spoiled(argument) if isinstance(argument, Tensor) else ():
            try:
                torch.ops.attn_ext.projected_attention(*valid[:position], wrong, *valid[position + 1 :])
            except (RuntimeError, ValueError, TypeError):
                continue
            accepted.add((position, what))
    assert not accepted


@each_projection
def test_a_bias_without_a_v(projection: str) -> None:
    query, weight, memory, _, _, *options = projected_arguments(projection, Case(projection.split()[0]))
    with pytest.raises(ValueError, match="bias came without v"):
        torch.ops.attn_ext.projected_attention(query, weight, memory, None, torch.zeros(4), *options)


@each_projection
def test_a_weight_of_the_wrong_size(projection: str) -> None:
    query, weight, *others = projected_arguments(projection, Case(projection.split()[0]))
    for wrong in (weight[:, 1:], torch.cat((weight, weight), 1), *([weight[1:]] if projection != "concat" else [])):
        with pytest.raises(ValueError, match=r"^weight has shape .*, needed "):
            torch.ops.attn_ext.projected_attention(query, wrong, *others)


@each_projection
def test_projections_of_tensors_without_data(projection: str) -> None:
    """Nothing is looked at then, whatever may be hidden."""
    *tensors, lengths, mask, scale, need_weights, by_keys = projected_arguments(
        projection, Case(projection.split()[0], masking="lengths+pairs")
    )
    with FakeTensorMode() as mode:
        fakes = [tensor if tensor is None else mode.from_tensor(tensor).requires_grad_() for tensor in tensors]
        options = (mode.from_tensor(lengths), mode.from_tensor(mask), scale, need_weights, by_keys)
        context, weights = torch.ops.attn_ext.projected_attention(*fakes, *options)
        (context.sum() + weights.sum()).backward()
    for fake in fakes:
        assert fake is None or fake.grad.shape == fake.shape


# What AttentionMemory calls besides: a step's backward takes the gradients of its query and its scores.


def scores_arguments(**fields: Any) -> tuple[Any, ...]:
    """Valid ones of additive_scores_backward, with the gradients of the scores that a step's backward gives."""
    *others, _ = arguments("prepared additive", "backward", **fields)
    _, _, query, _, keys, v, prepared, lengths, mask, *_ = others
    *_, grad_scores = op("backward")(*others, [True, False, False, False, True])
    return (grad_scores, query, keys, v, prepared, lengths, mask, [True, True])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
def test_opcheck_of_scores(masking: str, dtype: torch.dtype) -> None:
    valid = scores_arguments(masking=masking, dtype=dtype)
    opcheck(torch.ops.attn_ext.additive_scores_backward.default, valid)
    opcheck(torch.ops.attn_ext.prepare_keys.default, (valid[2],))


@pytest.mark.parametrize(
    ("B", "T", "S", "D"), [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (1, 1, 1, 1), (1, 70, 40, 33)]
)
def test_opcheck_of_sizes_of_scores(B: int, T: int, S: int, D: int) -> None:
    valid = scores_arguments(B=B, T=T, S=S, D=D, masking="lengths")
    opcheck(torch.ops.attn_ext.additive_scores_backward.default, valid)
    opcheck(torch.ops.attn_ext.prepare_keys.default, (valid[2],))


@pytest.mark.numerics
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masking", ["none", "lengths", "rows", "pairs", "lengths+pairs"])
@pytest.mark.parametrize("T", [1, 2, 7, 70], ids="T={}".format)
def test_steps_and_the_rest_make_the_whole(method: str, T: int, masking: str, loss: str) -> None:
    """A step's gradients, and what the gradients of its scores give the other tensors, are those of the whole op."""
    sizes = {"T": T, "S": 150, "D": 70, "Dm": 20}
    *others, wanted = arguments(method, "backward", **sizes, masking=masking, loss=loss, scale=0.5)
    grad_context, _, *inputs, _, _, _ = others
    query, _, keys, v, prepared, lengths, mask, _ = inputs
    _, weights, *_ = op("forward")(*inputs, True, [True, True])
    *expected, scores = op("backward")(*others, wanted)
    close = {"rtol": 1e-4, "atol": 1e-5}
    grad_query, *none, grad_scores = op("backward")(*others, [True, False, False, False, True])
    assert [grad.numel() for grad in none] == [0, 0, 0]
    torch.testing.assert_close(grad_query, expected[0], **close)
    torch.testing.assert_close(grad_scores, scores, **close)
    grad_memory = torch.zeros_like(expected[1]) if grad_context is None else weights.mT @ grad_context
    if method == "dot":
        grad_memory += grad_scores.mT @ query
    torch.testing.assert_close(grad_memory, expected[1], **close)
    if method == "keyed_dot":
        torch.testing.assert_close(grad_scores.mT @ query, expected[2], **close)
    elif v is not None:
        valid = (grad_scores, query, keys, v, prepared, lengths, mask)
        for wanted in ([True, True], [True, False], [False, True], [False, False]):
            some = torch.ops.attn_ext.additive_scores_backward(*valid, wanted)
            for grad, full, want in zip(some, expected[2:4], wanted, strict=True):
                torch.testing.assert_close(grad, full if want else full.new_empty(0), **close)


def test_nothing_crashes_with_scores() -> None:
    """As for the op itself. What keys alone tell the size of, nothing contradicts."""
    valid = scores_arguments(masking="lengths+pairs")
    calls = [(torch.ops.attn_ext.additive_scores_backward, valid), (torch.ops.attn_ext.prepare_keys, valid[2:3])]
    accepted = set()
    for call, args in calls:
        for position, argument in enumerate(args):
            for what, wrong in spoiled(argument) if isinstance(argument, Tensor) else ():
                try:
                    call(*args[:position], wrong, *args[position + 1 :])
                except (RuntimeError, ValueError, TypeError):
                    continue
                accepted.add((call, position, what))
    assert {call for call, *_ in accepted} <= {torch.ops.attn_ext.prepare_keys}, accepted


@pytest.mark.numerics
@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
@pytest.mark.parametrize("T", [1, 2, 7, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_prepared_keys_change_nothing(dtype: torch.dtype, T: int, masking: str) -> None:
    """Results and all gradients are those of the keys themselves."""
    for direction in ("forward", "backward"):
        with_prepared = list(arguments("prepared additive", direction, T=T, S=150, D=70, dtype=dtype, masking=masking))
        names = [argument.name for argument in op(direction)._schema.arguments]
        results = op(direction)(*with_prepared)
        with_prepared[names.index("prepared_keys")] = None
        torch.testing.assert_close(results, op(direction)(*with_prepared))


@pytest.mark.numerics
@pytest.mark.parametrize("spread", [1.0, 30.0, 400.0], ids="spread={}".format)
@pytest.mark.parametrize("T", [1, 9], ids="T={}".format)
def test_prepared_keys_are_guarded(T: int, spread: float) -> None:
    """Exponentials out of range: the keys themselves are taken, by tiles. Nobody looks behind a length."""
    generator = torch.Generator().manual_seed(0)
    query, keys, v = (torch.randn(size, generator=generator) for size in [(2, T, 70), (2, 300, 70), (70,)])
    query[0, :, 3], keys[0, :100, 3] = spread, -spread
    keys[1, 200:] = float("nan")
    lengths = torch.tensor([300, 200])
    values = torch.randn(2, 300, 5, generator=generator)
    prepared = torch.ops.attn_ext.prepare_keys(keys)
    options = (lengths, None, 1.0, True, [False, False])
    results = op("forward")(query, values, keys, v, prepared, *options)
    expected = op("forward")(query.double(), values.double(), keys.double(), v.double(), None, *options)
    # float64's log-sum-exp has sum(v) in it on a GPU, float32's leaves it out.
    for result, truth in zip(results[: 2 if cases.KERNELS == "cuda" else 3], expected, strict=False):
        torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-5)
