"""luong_attention and the two ops beneath it: argument checks, autocast, and the choice of backend."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_autocast_enabled
from torch.compiler import is_compiling, is_exporting
from torch.jit import is_tracing
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass

from attn_ext import autocast, backend, checks, reference

if TYPE_CHECKING:
    from attn_ext.memory import AttentionMemory

METHODS = ("dot", "general", "concat")


def _slow_on_cpu() -> tuple[torch.dtype, ...]:
    """The halves that this x86 processor has no matrix products of."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()

    def has(feature: str) -> bool:
        return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())

    products = {torch.bfloat16: has("avx512_bf16") or has("amx_tile"), torch.float16: has("amx_fp16")}
    return tuple(dtype for dtype, fast in products.items() if not fast)


_SLOW_ON_CPU = _slow_on_cpu()
# What a tensor of keys costs for each element of the memory, in the multiply-adds of products that take as long; of
# halves, whose average is taken off first, bfloat16's products are the faster. Measured on a processor that has them.
_KEYS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 64, torch.float16: 20}
# Keys that are not the memory have exact gradients where a tile of the kernels has a query's steps at once. And a key's
# rounding is common to all queries: of fewer features than that in halves, it would be most of an error.
_LONGEST_BY_KEYS, _LEAST_HALF_KEY = 256, 64
_OPS = torch.ops.attn_ext
# What an op, or a look at what is no tensor, says to wrong arguments.
REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
Attended = tuple[Tensor, Tensor | None]


def luong_attention(
    query: Tensor,
    memory: Tensor | AttentionMemory,
    method: str = "dot",
    *,
    weight: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | Collection[int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: bool = True,
) -> Attended:
    r"""Global attention of Luong, Pham and Manning (2015, arXiv 1508.04025): score, masked softmax and context.

    The score of eq. 8, for every query q and every row m of the memory::

        dot      e = q . m
        general  e = (weight q) . m
        concat   e = v . tanh(weight [q; m] + bias)          (Bahdanau, Cho, Bengio 2014, arXiv 1409.0473, A.1.2)

    then the alignment a = softmax(scale * e) over the steps that may be attended (eq. 7), the context c = sum a_s m_s.
    B batch, T queries, S source steps, Dq query size, Dm memory size, A attention size.

    torch.autocast casts the inputs as those of torch.nn.functional.linear. torch.compile and torch.export take a call
    as it is. The transforms of torch.func and forward-mode derivatives are refused by the fused ops, but for vmap of
    general and concat: within ``use_backend("reference")`` they work, but for vmap over `lengths`.

    Args:
        query: [B, T, Dq], or [B, Dq] for one decoder step; float32, float64, bfloat16 or float16 (halves accumulate in
            float32). Any strides.
        memory: [B, S, Dm], the encoder outputs, keys and values at once; or an :class:`AttentionMemory`, which brings
            the method, its parameters, lengths, mask and scale: of those, give none ("dot", the default, says nothing
            of a memory's method). Rows behind `lengths` or `mask` may hold anything.
        method: "dot" (Dm = Dq), "general" or "concat".
        weight: general: [Dm, Dq], concat: [A, Dq + Dm]; the weight of the nn.Linear of that name.
        v: concat: [A].
        bias: concat: [A], optional.
        lengths: [B] integers, 0 <= length <= S, as a tensor, a list or a NumPy array: source steps at and past the
            length are never attended.
        mask: [B, S] or [B, T, S] bool, True = may be attended (as in scaled_dot_product_attention).
        scale: multiplies the scores; None is 1.
        need_weights: False returns None for the weights, and nothing of size [B, T, S] outlives a call of the fused ops
            (of a step over an AttentionMemory, [B, S] does until its backward).

    Returns:
        context [B, T, Dm] (or [B, Dm]) and weights [B, T, S] (or [B, S]), in query's dtype. A query with nothing to
        attend, or whose scores are all -inf, has context 0, weights 0 and gradients 0.

    Raises:
        ValueError: a shape, device, length or method that does not fit; a parameter missing, or not of the method.
        TypeError: not a tensor, or not of the dtype needed.
    """
    if not isinstance(memory, Tensor):
        from attn_ext.memory import AttentionMemory

        if isinstance(memory, AttentionMemory):
            memory._refuse_second_opinion(
                "luong_attention",
                "memory",
                method,
                weight=weight,
                v=v,
                bias=bias,
                lengths=lengths,
                mask=mask,
                scale=scale,
            )
            return memory.attend(query, need_weights=need_weights)
    arguments = (method, query, memory, None, v, lengths, mask, scale, need_weights, weight, bias)
    attended = attend_unchecked(*arguments)
    return attend_checked("luong_attention", *arguments) if attended is None else attended


def dot_attention(
    query: Tensor,
    memory: Tensor,
    *,
    lengths: Tensor | Collection[int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: bool = True,
) -> Attended:
    """softmax(scale * q . m) over the steps that may be attended, and its context (Luong 2015, eq. 7 and 8, dot).

    Args:
        query: [B, T, D] or [B, D].
        memory: [B, S, D], keys and values at once.
        lengths, mask, scale, need_weights: as in :func:`luong_attention`.

    Returns:
        context [B, T, D] (or [B, D]); weights [B, T, S] (or [B, S]), or None.

    Raises:
        ValueError, TypeError: as :func:`luong_attention`.
    """
    arguments = ("dot", query, memory, None, None, lengths, mask, scale, need_weights)
    attended = attend_unchecked(*arguments)
    return attend_checked("dot_attention", *arguments) if attended is None else attended


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | Collection[int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: bool = True,
) -> Attended:
    """softmax(scale * v . tanh(q + k)) over the steps that may be attended, and its context (Bahdanau 2014, A.1.2).

    Query and keys are already projected: for concat, q = Wq query and k = Wm memory + bias with [Wq Wm] = weight.

    Args:
        query: [B, T, A] or [B, A].
        keys: [B, S, A].
        v: [A].
        values: [B, S, Dm].
        lengths, mask, scale, need_weights: as in :func:`luong_attention`.

    Returns:
        context [B, T, Dm] (or [B, Dm]); weights [B, T, S] (or [B, S]), or None.

    Raises:
        ValueError, TypeError: as :func:`luong_attention`.
    """
    arguments = ("additive", query, values, keys, v, lengths, mask, scale, need_weights)
    attended = attend_unchecked(*arguments)
    return attend_checked("additive_attention", *arguments) if attended is None else attended


def attend(
    query: Tensor,
    memory: Tensor,
    keys: Tensor | None,
    v: Tensor | None,
    *,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """Checked arguments, in the backend in force: additive with a `v`, dot products without.

    Query and memory are projected ones, or with a `weight` are yet to be: concat with a `v`, general without.
    """
    with autocast.disabled(query):  # a projection may be of a wider type, and so are the reference's products
        if not backend.fused_runs_on(query.device.type):
            options: dict[str, Any] = {"lengths": lengths, "mask": mask, "scale": scale, "need_weights": need_weights}
            if weight is not None:
                return reference.projected_attention(query, weight, memory, v, bias, **options)
            return reference.attention(query, memory, keys, v, **options)
        with transforms_explained():
            if weight is not None:
                op = _OPS.projected_attention.default
                context, weights = _project_and_attend(
                    op, query, v, memory, lengths, mask, scale, need_weights, weight, bias
                )
            else:
                context, weights, *_ = _OPS.attention.default(
                    query, memory, keys, v, None, lengths, mask, scale, need_weights, [False, False]
                )
    return context, weights if need_weights else None


NO_TRANSFORMS = (
    "attn_ext's compiled ops have no rules for torch.func's transforms (vmap, grad, jvp) and forward-mode "
    "derivatives, which work within attn_ext.use_backend('reference'), with a memory made there"
)


def transforms_explained() -> AbstractContextManager[None]:
    """Where the ops run: PyTorch's own words for what they do not go with are of its insides."""
    return nullcontext() if is_compiling() else _transforms_explained()


# What PyTorch says of an op that a transform has no rule for, and the memory of queries that one has wrapped.
_HAS_NO_RULE = (
    "functorch transforms",
    "Batching rule not implemented",
    "jvp is not implemented",
    "node must be what memory_node returned",
)


@contextmanager
def _transforms_explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if any(words in str(error) for words in _HAS_NO_RULE):
            raise RuntimeError(NO_TRANSFORMS) from error
        raise


def attend_unchecked(
    method: str,
    query: Tensor,
    memory: Tensor,
    keys: Tensor | None,
    v: Tensor | None,
    lengths: Any,
    mask: Tensor | None,
    scale: float | None,
    need_weights: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Attended | None:
    """`attend` for arguments as the caller gave them; None if they need a conversion, or a check's words for a refusal.

    "additive" is of projected tensors. The checks would be most of a small call's time. The ops refuse all that the
    checks would, which therefore run after a refusal alone, to word it.
    """
    try:
        if not goes_unchecked(query, memory, keys, v, weight, bias, lengths, mask):
            return None
        if scale is None:
            scale = 1.0
        elif type(scale) is not float or not math.isfinite(scale):
            return None
        if lengths is not None and (lengths.dtype is not torch.int64 or lengths.device != query.device):
            return None
        if type(need_weights) is not bool:
            return None
        if method == "additive":
            if keys is None or v is None:
                return None
        elif not _has_its_parameters(method, query, weight, v, bias):
            return None
        elif weight is not None:
            op = backend.calls.projected_attention
            return _project_and_attend(op, query, v, memory, lengths, mask, scale, need_weights, weight, bias)
        return backend.calls.attention(query, memory, keys, v, lengths, mask, scale, need_weights)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # nothing that a check would word
    except REFUSALS:
        return None


def attend_checked(
    caller: str,
    method: str,
    query: Tensor,
    memory: Tensor,
    keys: Tensor | None,
    v: Tensor | None,
    lengths: Any,
    mask: Tensor | None,
    scale: float | None,
    need_weights: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Attended:
    """`attend` for the same arguments, cast as autocast wants them and checked as `caller`'s."""
    given = query, memory, keys, v, weight, bias
    query, memory, keys, v, weight, bias = cast = autocast.cast(*given)
    arguments = checks.Arguments(caller)
    arguments.came_from_autocast(given, cast)
    if caller == "additive_attention":  # another caller may have been given its method, "additive", and refuses it
        check_query(arguments, query, "A")
        arguments.floating("keys", keys, "B S A")
        arguments.floating("v", v, "A")
        arguments.floating("values", memory, "B S Dm")
    else:
        check_query(arguments, query)
        check_memory(arguments, memory, method, weight, v, bias)
    lengths = arguments.lengths(lengths)
    arguments.mask(mask)
    scale = arguments.scale(scale)
    arguments.flag("need_weights", need_weights)
    options: dict[str, Any] = {"lengths": lengths, "mask": mask, "scale": scale, "need_weights": need_weights}
    return attend(query, memory, keys, v, **options, weight=weight, bias=bias)


def _project_and_attend(
    op: Callable[..., Attended],
    query: Tensor,
    v: Tensor | None,
    memory: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: bool,
    weight: Tensor,
    bias: Tensor | None,
) -> Attended:
    """General and concat with their projections as one op, attn_ext::projected_attention by one of its names."""
    by_keys = v is None and has_fewer_keys(query, memory, weight)
    weight, bias = of_products(query, weight, bias)
    return op(query, weight, memory, v, bias, lengths, mask, scale, need_weights, by_keys)


def _has_its_parameters(
    method: str, query: Tensor, weight: Tensor | None, v: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether these parameters are right, or wrong in a way that the products or the ops refuse."""
    if method == "dot":
        return weight is None and v is None and bias is None
    # The products would take others, and broadcast a bias.
    if weight is None or weight.dtype is not query.dtype or weight.layout is not torch.strided:
        return False
    if method == "general":
        return v is None and bias is None
    return (
        method == "concat"
        and v is not None
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype is query.dtype))
    )


def goes_unchecked(query: Tensor, *others: Tensor | None) -> bool:
    """Whether the ops may see a call as it is: nothing is traced, overridden or cast, and they are the backend."""
    if is_compiling() or is_tracing() or has_torch_function((query, *others)):
        return False
    # A device writes its type's name anew at each look, which takes as long as all of these conditions.
    device_type = "cpu" if query.is_cpu else query.device.type
    return not is_autocast_enabled(device_type) and backend.fused_runs_on(device_type)


def check_memory(
    arguments: checks.Arguments,
    memory: Tensor,
    method: str,
    weight: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
) -> None:
    """The memory and the method's parameters: shapes, dtypes, and that the method has just the ones it needs."""
    caller = arguments.caller
    checks.choice(caller, "method", method, METHODS)
    arguments.floating("memory", memory, "B S Dq" if method == "dot" else "B S Dm")
    needed = {"dot": (), "general": ("weight",), "concat": ("weight", "v")}[method]
    optional = ("bias",) if method == "concat" else ()
    shapes = {"weight": "[Dm, Dq]" if method == "general" else "[A, Dq + Dm]", "v": "[A]"}
    for name, value in {"weight": weight, "v": v, "bias": bias}.items():
        if value is None and name in needed:
            raise ValueError(f"{caller}: method={method!r} needs {name} {shapes[name]}, got None")
        if value is not None and name not in needed + optional:
            raise ValueError(f"{caller}: method={method!r} has no {name}, got one: it must be None")
    if method == "general":
        arguments.floating("weight", weight, "Dm Dq")
    elif method == "concat":
        if "Dq" in arguments.sizes:
            arguments.bind("Dq+Dm", arguments.sizes["Dq"] + arguments.sizes["Dm"], "query and memory")
        arguments.floating("weight", weight, "A Dq+Dm")
        if weight.shape[1] < memory.shape[-1]:
            raise ValueError(
                f"{caller}: weight has shape {list(weight.shape)}, "
                f"needed is [A, Dq + Dm] with Dm={memory.shape[-1]} (from memory)"
            )
        arguments.floating("v", v, "A")
        if bias is not None:
            arguments.floating("bias", bias, "A")


def has_fewer_keys(query: Tensor, memory: Tensor, weight: Tensor) -> bool:
    """Whether general attention costs less by way of keys [B, S, Dq] than by queries projected to [B, T, Dm].

    On a GPU, whose products cost little beside a tensor more to read and to write, it is not known to.
    """
    # A single query never is the dearer side. An exported program is for all sizes.
    if query.dim() != 3 or is_exporting() or query.size(1) == 1 or memory.dim() != 3 or not query.is_cpu:
        return False
    B, T, Dq = query.shape
    _, S, Dm = memory.shape
    if S > _LONGEST_BY_KEYS or (query.element_size() < 4 and Dq < _LEAST_HALF_KEY):
        return False
    saved = B * ((T - S) * Dq * Dm + T * S * (Dm - Dq))  # the scores are products of Dm, or of Dq
    cost = _KEYS.get(query.dtype, 0) * B * S * Dm
    return saved > cost and (query.dtype is not torch.float16 or _keys_fit_float16(memory, weight))


def _keys_fit_float16(memory: Tensor, weight: Tensor) -> bool:
    """Whether none overflows, as one can where no score does: known by what they are at most, where one can look."""
    if is_compiling() or is_tracing() or is_in_torch_dispatch_mode() or memory.numel() == 0 or weight.numel() == 0:
        return False
    if any(type(t) not in checks.PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (memory, weight)):
        return False
    smallest, largest = (extreme.item() for extreme in torch.aminmax(memory.detach()))  # NaN where a masked row is
    factors = weight.detach().abs().sum(0, dtype=torch.float32).max().item()
    # Twice, since the memory's average is taken off first.
    return 2 * max(-smallest, largest) * max(factors, 1.0) < torch.finfo(torch.float16).max


def is_slow(features: Tensor) -> bool:
    """Whether PyTorch's products with them are slower than of float32, their type having none on this processor."""
    return features.dtype in _SLOW_ON_CPU and features.is_cpu


def of_products(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A projection's parameters, in the type that an op's product with `features` is to be taken in.

    Raises:
        TypeError: the weight is one that Python makes of others, whose gradient the ops would write as a plain tensor.
    """
    if type(weight) not in checks.PLAIN and not is_compiling() and is_traceable_wrapper_subclass(weight):
        raise TypeError(
            f"attn_ext: weight is a {type(weight).__name__}, of which the compiled ops make no gradient; "
            "within attn_ext.use_backend('reference') it has one"
        )
    if not is_slow(features) or (backend.multiplies and features.dtype is torch.float16):
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


def linear(features: Tensor, weight: Tensor) -> Tensor:
    """F.linear, in float32 where that is faster."""
    if not is_slow(features):
        return F.linear(features, weight)
    return F.linear(features.float(), weight.float()).to(features.dtype)


def check_query(arguments: checks.Arguments, query: Tensor, size: str = "Dq", name: str = "query") -> None:
    arguments.tensor(name, query)
    if query.dim() not in (2, 3):
        raise ValueError(
            f"{arguments.caller}: {name} has shape {list(query.shape)}, needed is [B, T, {size}], "
            f"or [B, {size}] for one decoder step"
        )
    if query.dim() == 2:
        arguments.bind("T", 1, name)
    arguments.floating(name, query, f"B T {size}" if query.dim() == 3 else f"B {size}")
