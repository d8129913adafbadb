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
from tests.cases import DTYPES, LOSSES, Case, short, spoiled

pytestmark = pytest.mark.fused

NAMES = {"dot": "dot_attention", "keyed_dot": "keyed_dot_attention", "additive": "additive_attention"}
# The ops take their tensors by position.
TENSORS = {
    "dot": ("query", "memory"),
    "keyed_dot": ("query", "keys", "values"),
    "additive": ("query", "keys", "v", "values"),
}


def op(method: str, direction: str) -> Any:
    name = NAMES[method] if direction == "forward" else f"{NAMES[method]}_backward"
    return getattr(torch.ops.attn_ext, name).default


def arguments(case: Case, direction: str) -> tuple[Any, ...]:
    """Valid ones: for the backward op, with what the forward op returned."""
    problem = case.problem()
    tensors = [problem.tensors[name] for name in TENSORS[case.method]]
    options = [problem.options["lengths"], problem.options["mask"], 1.0 if case.scale is None else case.scale]
    need_weights = problem.options["need_weights"]
    if direction == "forward":
        return (*tensors, *options, need_weights, [case.loss == "both", case.loss != "no_weights"])
    context, weights, logsumexp = exact(op(case.method, "forward")(*tensors, *options, need_weights, [True, True]))
    grads = [problem.grad_outputs.get(name) for name in ("context", "weights")]
    return (*grads, *tensors, *options, context, weights if need_weights else None, logsumexp, [True] * len(tensors))


def exact(outputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a forward op's results, context and weights as they were accumulated, and the log-sum-exp."""
    context, weights, logsumexp, unrounded = outputs
    return (*(unrounded or (context, weights)), logsumexp)


@pytest.fixture(params=NAMES)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["forward", "backward"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("direction", "loss"),
    [("forward", "both"), ("forward", "no_weights"), *(("backward", loss) for loss in LOSSES)],
)
@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
def test_opcheck(method: str, direction: str, masking: str, loss: str) -> None:
    opcheck(op(method, direction), arguments(Case(method, masking=masking, loss=loss, scale=0.5), direction))


@pytest.mark.parametrize(
    "sizes", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (1, 1, 1, 1), (1, 70, 40, 33)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=short)
def test_opcheck_of_sizes(method: str, direction: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    opcheck(op(method, direction), arguments(Case(method, *sizes, dtype=dtype, masking="lengths"), direction))


@pytest.mark.parametrize("wanted", [0, 1, -1], ids=["none", "the first", "the last"])
def test_opcheck_of_wanted_gradients(method: str, wanted: int) -> None:
    *others, all_wanted = arguments(Case(method, masking="rows"), "backward")
    some = [False] * len(all_wanted)
    if wanted:
        some[wanted if wanted < 0 else 0] = True
    opcheck(op(method, "backward"), (*others, some))
    assert [grad.numel() > 0 for grad in op(method, "backward")(*others, some)] == some


def test_opcheck_of_strides(method: str, direction: str) -> None:
    views = tuple(
        a.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(a, Tensor) and a.dim() == 3 else a
        for a in arguments(Case(method, masking="pairs"), direction)
    )
    opcheck(op(method, direction), views)


@pytest.mark.parametrize("loss", ["both", "no_weights"])
@pytest.mark.parametrize("masking", ["none", "lengths+pairs"])
def test_opcheck_with_gradients(method: str, masking: str, loss: str) -> None:
    """The op is differentiable by itself, also where torch.compile traces both passes."""
    *tensors, lengths, mask, scale, need_weights, _ = arguments(Case(method, masking=masking, loss=loss), "forward")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    opcheck(op(method, "forward"), (*leaves, lengths, mask, scale, need_weights, [False, False]))


@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
def test_one_step_without_its_dimension(method: str, masking: str) -> None:
    """A query [B, D] gives what [B, 1, D] gives, to the bit, in every tensor; and a mask may have the 1 or not."""
    for direction in ("forward", "backward"):
        case = Case(method, T=1, S=37, D=20, masking=masking)
        with_dimension = arguments(case, direction)
        per_query = {"query", "grad_context", "grad_weights", "context", "weights", "logsumexp"}
        names = [argument.name for argument in op(method, direction)._schema.arguments]
        without = [
            a.squeeze(1) if name in per_query and isinstance(a, Tensor) else a
            for name, a in zip(names, with_dimension, strict=True)
        ]
        opcheck(op(method, direction), tuple(without))
        results, expected = (op(method, direction)(*args) for args in (without, with_dimension))
        for name, result, other in zip(op(method, direction)._schema.returns, results, expected, strict=True):
            one_step = direction == "forward" or name.name == "grad_query"
            if name.name == "exact":
                assert result == other == []
            else:
                assert torch.equal(result, other.squeeze(1) if one_step else other), name


@pytest.mark.parametrize("masking", ["none", "lengths+pairs"])
@pytest.mark.parametrize("one_step", [False, True], ids=["[B, T, D]", "[B, D]"])
def test_derivatives_of_the_op(method: str, masking: str, one_step: bool) -> None:
    """First and second, with no Python function around it; the log-sum-exp has none."""
    case = Case(method, T=1 if one_step else 2, S=4, D=3, Dm=2, dtype=torch.float64, masking=masking)
    query, *tensors = arguments(case, "forward")
    inputs = [
        t.requires_grad_()
        for t in (query[:, 0] if one_step else query, *tensors)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    options = tensors[len(inputs) - 1 :]

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        context, weights, logsumexp, _ = op(method, "forward")(*inputs, *options)
        assert not logsumexp.requires_grad
        return context, weights

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.numerics
@pytest.mark.parametrize("masking", ["none", "lengths", "rows", "pairs"])
@pytest.mark.parametrize(("T", "S"), [(1, 37), (1, 2100), (5, 300), (70, 37), (130, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_halves_are_rounded_where_they_are_written(
    method: str, dtype: torch.dtype, T: int, S: int, masking: str
) -> None:
    """From what float32 accumulates, which comes with them where it is asked for; to the same bits either way.

    But a CPU's context of rounded weights over several tiles, which is not as exact where no backward is to read it.
    """
    *tensors, lengths, mask, scale, _, _ = arguments(
        Case(method, B=2, T=T, S=S, D=40, dtype=dtype, masking=masking), "forward"
    )
    wide = op(method, "forward")(*(tensor.float() for tensor in tensors), lengths, mask, scale, True, [True, True])
    *rounded, logsumexp, unrounded = op(method, "forward")(*tensors, lengths, mask, scale, True, [True, True])
    assert wide[3] == []
    assert logsumexp.dtype == torch.float32
    # Products of halves take the context from rounded weights.
    on_gpu = cases.KERNELS == "cuda"
    if on_gpu:
        from_rounded = T > 1 or method == "keyed_dot"
    else:
        capability = torch.ops.attn_ext.cpu_capability()
        has_pairs = dtype == torch.bfloat16 and capability in ("avx512_bf16", "avx512_amx")
        from_rounded = has_pairs and T >= 16
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
            context, weights, _, some = op(method, "forward")(*tensors, lengths, mask, scale, need_weights, need_exact)
            if from_rounded and not on_gpu and S == 600 and not need_exact[0]:
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
    case = Case(method, S=37, D=20, dtype=torch.bfloat16)
    *tensors, lengths, mask, scale, need_weights, _ = arguments(case, "forward")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    context, weights, *_ = op(method, "forward")(*leaves, lengths, mask, scale, need_weights, [False, False])
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
    name = NAMES[{"general": "dot", "concat": "additive"}.get(function, function)]
    capability = f"[{torch.ops.attn_ext.cpu_capability()}]" if cases.KERNELS == "cpu" else ""
    forward, backward = (f"attn_ext::{cases.KERNELS}::{name}_{d}{capability}" for d in ("forward", "backward"))
    assert ranges(lambda: problem.function(**problem.tensors, **problem.options)) == {forward}
    assert ranges(problem.results) == {forward, backward}
    assert ranges(problem.reference_results) == set()


def test_the_reference_differentiates_twice(method: str) -> None:
    """create_graph=True is the one backward pass that the compiled op leaves to the reference."""
    problem = Case(method).problem()
    query = problem.tensors["query"].requires_grad_()
    context, _ = problem.function(**problem.tensors)
    assert ranges(lambda: torch.autograd.grad(context.sum(), query, create_graph=True)) == set()


# Each size here is told by at least two arguments, but for these: the size of `values` in the forward pass.
FREE = {
    (method, "forward", position, f"size {size} in dim 2")
    for method, position in (("keyed_dot", 2), ("additive", 3))
    for size in (5, 7)
}


def test_nothing_crashes(method: str, direction: str) -> None:
    """Every tensor argument spoiled in every way, the rest valid: an exception, never a crash or a result."""
    valid = arguments(Case(method, masking="lengths+pairs"), direction)
    accepted = []
    for position, argument in enumerate(valid):
        if not isinstance(argument, Tensor):
            continue
        for what, wrong in spoiled(argument):
            try:
                op(method, direction)(*valid[:position], wrong, *valid[position + 1 :])
            except (RuntimeError, ValueError, TypeError):
                continue
            accepted.append((method, direction, position, what))
    assert set(accepted) <= FREE


@pytest.mark.cpu
@pytest.mark.parametrize("lengths", [[6, 2], [-1, 2], [2**62, -(2**62)]], ids=str)
def test_lengths_out_of_range(method: str, direction: str, lengths: list[int]) -> None:
    """Nothing before the memory or beyond S is read."""
    valid = arguments(Case(method, masking="lengths"), direction)
    position = next(i for i, a in enumerate(valid) if isinstance(a, Tensor) and a.dtype == torch.int64)
    text = rf"^lengths\[0\] is {lengths[0]}, needed is 0 <= length <= S=5$"
    with pytest.raises(ValueError, match=text):
        op(method, direction)(*valid[:position], torch.tensor(lengths), *valid[position + 1 :])
    wider = torch.tensor([[lengths[0], 0], [lengths[1], 0]])[:, 0]
    with pytest.raises(ValueError, match=text):
        op(method, direction)(*valid[:position], wider, *valid[position + 1 :])


def test_tensors_on_two_devices(method: str, direction: str) -> None:
    """A meta tensor has no data to read."""
    valid = arguments(Case(method, masking="lengths+rows"), direction)
    for position, argument in enumerate(valid):
        if isinstance(argument, Tensor):
            try:
                outputs = op(method, direction)(*valid[:position], argument.to("meta"), *valid[position + 1 :])
            except (RuntimeError, ValueError):
                continue
            assert all(output.is_meta for output in outputs)


@pytest.mark.parametrize("scale", [0.0, 1e30, -1e300], ids=str)
def test_any_scale(method: str, scale: float) -> None:
    """Numbers without a meaning give numbers without a meaning, in both directions, and no crash."""
    problem = Case(method, S=70, masking="lengths", scale=scale).problem()
    assert problem.results()["context"].shape == (2, 3, problem.grad_outputs["context"].shape[-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
def test_any_values(method: str, value: float) -> None:
    """NaN, infinity or almost that in one batch element spreads to no other."""
    problem = Case(method, B=2, T=5, S=70, D=20).problem()
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
    *others, context, weights, logsumexp, wanted = arguments(Case(method, T=T, S=S, D=20, dtype=dtype), "backward")
    one_query = T == 1 and method != "keyed_dot"
    if S > 256 if cases.KERNELS == "cpu" else one_query:
        with pytest.raises(ValueError, match="context is missing"):
            op(method, "backward")(*others, None, weights, logsumexp, wanted)
        return
    without, given = (op(method, "backward")(*others, some, weights, logsumexp, wanted) for some in (None, context))
    assert all(map(torch.equal, without, given))
    opcheck(op(method, "backward"), (*others, None, weights, logsumexp, wanted))


def test_wrong_number_of_wanted_gradients(method: str) -> None:
    *others, wanted = arguments(Case(method), "backward")
    for wrong in ([], wanted[1:], [*wanted, True]):
        with pytest.raises((RuntimeError, TypeError)):
            op(method, "backward")(*others, wrong)


def test_no_gradient_comes_back(method: str) -> None:
    """Neither through the context nor through the weights: refused or zeros, never what memory happened to hold."""
    valid = arguments(Case(method), "backward")
    try:
        grads = op(method, "backward")(None, None, *valid[2:])
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


# The ops of a decoder loop's steps, which AttentionMemory calls.

each_step_method = pytest.mark.parametrize("method", ["dot", "additive"])


def step_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    """Valid ones for each of the ops that the score has."""
    problem = case.problem()
    query, *keys_and_v, memory = (problem.tensors[name] for name in TENSORS[case.method])
    keys, v = keys_and_v or (None, None)
    prepared = None if keys is None else torch.ops.attn_ext.prepare_keys(keys)
    lengths, mask, scale = problem.options["lengths"], problem.options["mask"], 0.5
    inputs = (query, keys, prepared, v, memory, lengths, mask, scale)
    context, weights, logsumexp = exact(torch.ops.attn_ext.step_attention(*inputs, True, [True, True]))
    grads = [problem.grad_outputs.get(name) for name in ("context", "weights")]
    calls: dict[str, tuple[Any, ...]] = {
        "step_attention": (*inputs, True, [True, True]),
        "step_attention_backward": (*grads, *inputs, context, weights, logsumexp),
    }
    if keys is not None:
        _, grad_scores = torch.ops.attn_ext.step_attention_backward(*calls["step_attention_backward"])
        calls["prepare_keys"] = (keys,)
        calls["additive_scores_backward"] = (grad_scores, query, keys, prepared, v, lengths, mask, [True, True])
    return calls


@each_step_method
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("masking", ["none", "lengths+rows", "pairs"])
def test_opcheck_of_steps(method: str, masking: str, dtype: torch.dtype) -> None:
    for name, args in step_arguments(Case(method, masking=masking, dtype=dtype)).items():
        opcheck(getattr(torch.ops.attn_ext, name).default, args)


@each_step_method
@pytest.mark.parametrize(
    "sizes", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (1, 1, 1, 1), (1, 70, 40, 33)], ids=str
)
def test_opcheck_of_sizes_of_steps(method: str, sizes: tuple[int, ...]) -> None:
    for name, args in step_arguments(Case(method, *sizes, masking="lengths")).items():
        opcheck(getattr(torch.ops.attn_ext, name).default, args)


@pytest.mark.numerics
@each_step_method
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masking", ["none", "lengths", "rows", "pairs", "lengths+pairs"])
@pytest.mark.parametrize("T", [1, 2, 7, 70], ids="T={}".format)
def test_steps_and_the_rest_make_the_whole(method: str, T: int, masking: str, loss: str) -> None:
    """A step's gradients, and what the gradients of its scores give the memory's tensors, are those of the whole op."""
    case = Case(method, T=T, S=150, D=70, Dm=20, masking=masking, loss=loss, scale=0.5)
    calls = step_arguments(case)
    context, weights, logsumexp, _ = torch.ops.attn_ext.step_attention(*calls["step_attention"])
    whole = arguments(case, "backward")
    torch.testing.assert_close(
        torch.ops.attn_ext.step_attention(*calls["step_attention"]),
        op(method, "forward")(
            *(a for a in calls["step_attention"][:5] if a is not None and a is not calls["step_attention"][2]),
            *calls["step_attention"][5:],
        ),
    )
    grad_query, grad_scores = torch.ops.attn_ext.step_attention_backward(*calls["step_attention_backward"])
    grad_context, grad_weights, *_ = calls["step_attention_backward"]
    expected = op(method, "backward")(
        grad_context,
        grad_weights,
        *whole[2 : 2 + len(TENSORS[method])],
        *whole[-7:-4],
        context,
        weights,
        logsumexp,
        whole[-1],
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(grad_query, expected[0], **close)
    grad_memory = torch.zeros_like(expected[-1]) if grad_context is None else weights.mT @ grad_context
    if method == "dot":
        grad_memory += grad_scores.mT @ calls["step_attention"][0]
    else:
        rest = torch.ops.attn_ext.additive_scores_backward(*calls["additive_scores_backward"])
        torch.testing.assert_close(rest, expected[1:3], **close)
        *others, _ = calls["additive_scores_backward"]
        for wanted in ([True, False], [False, True], [False, False]):
            some = torch.ops.attn_ext.additive_scores_backward(*others, wanted)
            for grad, full, want in zip(some, rest, wanted, strict=True):
                torch.testing.assert_close(grad, full if want else full.new_empty(0), **close)
    torch.testing.assert_close(grad_memory, expected[-1], **close)


@each_step_method
def test_nothing_crashes_in_a_step(method: str) -> None:
    """As for the ops themselves. What keys alone tell the size of, nothing contradicts."""
    accepted = []
    for name, valid in step_arguments(Case(method, masking="lengths+pairs")).items():
        for position, argument in enumerate(valid):
            for what, wrong in spoiled(argument) if isinstance(argument, Tensor) else ():
                try:
                    getattr(torch.ops.attn_ext, name)(*valid[:position], wrong, *valid[position + 1 :])
                except (RuntimeError, ValueError, TypeError):
                    continue
                accepted.append((name, position, what))
    free = {("prepare_keys", 0), ("step_attention", 4)} if method == "additive" else set()
    assert {entry[:2] for entry in accepted} <= free, accepted


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
    results = torch.ops.attn_ext.step_attention(
        query, keys, prepared, v, values, lengths, None, 1.0, True, [False, False]
    )
    expected = torch.ops.attn_ext.additive_attention(
        query.double(), keys.double(), v.double(), values.double(), lengths, None, 1.0, True, [False, False]
    )
    # float64's log-sum-exp has sum(v) in it on a GPU, float32's leaves it out.
    for result, truth in zip(results[: 2 if cases.KERNELS == "cuda" else 3], expected, strict=False):
        torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-5)
