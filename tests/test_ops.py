"""torch.ops.attn_ext.*, called directly: what PyTorch asks of an op, which kernel runs, and unchecked input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.cases import DTYPES, LOSSES, Case, short

pytestmark = pytest.mark.fused

NAMES = {"dot": "dot_attention", "additive": "additive_attention"}
# The ops take their tensors by position.
TENSORS = {"dot": ("query", "memory"), "additive": ("query", "keys", "v", "values")}


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
        return (*tensors, *options, need_weights)
    context, weights, logsumexp = op(case.method, "forward")(*tensors, *options, need_weights)
    grads = [problem.grad_outputs.get(name) for name in ("context", "weights")]
    return (*grads, *tensors, *options, context, weights if need_weights else None, logsumexp, [True] * len(tensors))


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


def ranges(call: Callable[[], object]) -> set[str]:
    """The attn_ext ranges that a call records under the profiler."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.name for event in profile.function_events if event.name.startswith("attn_ext::cpu::")}


@pytest.mark.parametrize("T", [1, 5, 70], ids="T={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("function", ["dot", "general", "additive", "concat"])
def test_the_fused_kernels_run(function: str, dtype: torch.dtype, T: int) -> None:
    """By name: the forward kernel, and with gradients the backward kernel; none under "reference"."""
    problem = Case(function, T=T, S=37, D=20, dtype=dtype, masking="lengths").problem()
    name = "dot_attention" if function in ("dot", "general") else "additive_attention"
    forward, backward = (
        f"attn_ext::cpu::{name}_{d}[{torch.ops.attn_ext.cpu_capability()}]" for d in ("forward", "backward")
    )
    assert ranges(lambda: problem.function(**problem.tensors, **problem.options)) == {forward}
    assert ranges(problem.results) == {forward, backward}
    assert ranges(problem.reference_results) == set()


def test_the_reference_differentiates_twice(method: str) -> None:
    """create_graph=True is the one backward pass that the compiled op leaves to the reference."""
    problem = Case(method).problem()
    query = problem.tensors["query"].requires_grad_()
    context, _ = problem.function(**problem.tensors)
    assert ranges(lambda: torch.autograd.grad(context.sum(), query, create_graph=True)) == set()


def spoiled(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same argument with something wrong about it."""
    yield "one dimension more", tensor.unsqueeze(0)
    yield "no dimension", tensor.new_zeros(())
    yield "empty", tensor.new_zeros(0)
    if tensor.dim() > 1:
        yield "flat", tensor.flatten()
    for dim, size in enumerate(tensor.shape):
        yield f"size {size - 1} in dim {dim}", tensor.narrow(dim, 0, size - 1)
        yield f"size {size + 1} in dim {dim}", torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64, torch.int32, torch.int64, torch.bool):
        if dtype != tensor.dtype:
            yield f"dtype {dtype}", tensor.to(dtype)
    yield "layout sparse", tensor.to_sparse()


# Each size here is told by at least two arguments, but for these: the size of `values` in the forward pass.
FREE = {("additive", "forward", 3, "size 5 in dim 2"), ("additive", "forward", 3, "size 7 in dim 2")}


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


@pytest.mark.parametrize("lengths", [[6, 2], [-1, 2], [2**62, -(2**62)]], ids=str)
def test_lengths_out_of_range(method: str, direction: str, lengths: list[int]) -> None:
    """The Python functions refuse them; here they may be refused or cut to 0..S, but nothing beyond S is read."""
    valid = arguments(Case(method, masking="lengths"), direction)
    position = next(i for i, a in enumerate(valid) if isinstance(a, Tensor) and a.dtype == torch.int64)

    def with_lengths(values: list[int]) -> tuple[Tensor, ...]:
        return op(method, direction)(*valid[:position], torch.tensor(values), *valid[position + 1 :])

    try:
        outputs = with_lengths(lengths)
    except RuntimeError:
        return
    cut = with_lengths([min(max(n, 0), 5) for n in lengths])
    assert all(map(torch.equal, outputs, cut))


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
