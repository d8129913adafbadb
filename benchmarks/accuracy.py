"""How exact the ops are: `python -m benchmarks.accuracy`.

Errors against the reference in float64, next to those of the reference in float32, whose additive scores take PyTorch's
tanh of every (query, step, feature). Scores are compared as the log of the weights, the gradients as they are; every
error is divided by the largest magnitude of its tensor, scores' by 1: an error of e in a score changes a weight by a
factor of exp(e).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import attn_ext

Op = Callable[..., tuple[Tensor, Tensor]]

B, T, S, A = 2, 24, 50, 512
ADDITIVE = ("scores", "context", "query", "keys", "v", "values")
DOT = ("scores", "context", "query", "memory")


def additive_cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, queries [B, T, A] and keys [B, S, A]."""
    torch.manual_seed(0)
    query, keys = torch.randn(B, T, A), torch.randn(B, S, A)
    yield "normal, standard deviation 0.02", 0.02 * query, 0.02 * keys
    yield "normal, standard deviation 1", query, keys
    yield "normal, standard deviation 3", 3 * query, 3 * keys
    yield "normal, standard deviation 8", 8 * query, 8 * keys
    yield "queries at +60, keys at -60", query + 60, keys - 60
    yield "uniform in -1000 to 1000", torch.rand(B, T, A) * 2000 - 1000, torch.rand(B, S, A) * 2000 - 1000
    outlier = query.clone()
    outlier[1, 3, 7] = 1e4
    yield "one feature of one row at 10000", outlier, keys


def dot_cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, queries [B, T, A] and memories [B, S, A], of one tile of source steps and of several."""
    torch.manual_seed(0)
    for steps in (S, 6 * S):
        yield f"normal, S={steps}", A**-0.5 * torch.randn(B, T, A), torch.randn(B, steps, A)
        # Integers, whose scores are exact: the sum of the scores' gradients, which is 0, is all that can go wrong.
        query = torch.randint(-2, 3, (B, 1, A)).float().expand(B, T, A)
        memory = torch.where(torch.rand(B, steps, A) < 4 / A, 0.0, query[:, :1].sign())
        yield f"rows alike but in 4 of {A} features, S={steps}", query, memory


def halves_cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same, of memories whose rows have more in common than they differ by."""
    torch.manual_seed(0)
    query, differing, common = A**-0.5 * torch.randn(B, T, A), 0.3 * torch.randn(B, S, A), torch.randn(A)
    for times in (0, 1, 10):
        yield f"rows that differ by 0.3, and have {times} in common", query, differing + times * common


def plain(op: Op) -> Op:
    """The same by the reference."""

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with attn_ext.use_backend("reference"):
            return op(*inputs)

    return call


def results(op: Op, dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    """In float64: the log of the weights, the context, and the gradients of the inputs."""
    inputs = tuple(tensor.to(dtype).requires_grad_() for tensor in inputs)
    context, weights = op(*inputs)
    grad_context = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(context, inputs, grad_context)
    return [tensor.detach().double() for tensor in (weights.double().log(), context, *grads)]


def print_rows(
    name: str,
    tensors: tuple[str, ...],
    ops: dict[str, Op],
    *inputs: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The largest error of each tensor, a row for each op; the last is the one whose float64 is the truth."""
    inputs = tuple(tensor.to(dtype) for tensor in inputs)
    exact = results(list(ops.values())[-1], torch.float64, *inputs)
    for label, op in ops.items():
        cells = [f"| {name} | {label}"]
        for tensor, result, truth in zip(tensors, results(op, dtype, *inputs), exact, strict=True):
            size = 1.0 if tensor == "scores" else truth.abs().max().item()
            cells.append(f"{(result - truth).abs().max().item() / size:.1e}")
        print(" | ".join(cells) + " |")


def print_head(op: str, tensors: tuple[str, ...]) -> None:
    print(f"\n{op}\n\n| inputs | implementation | {' | '.join(tensors)} |\n|---|---|{'---|' * len(tensors)}")


def main() -> None:
    print(f"B={B} T={T} S={S} A={A}, {torch.ops.attn_ext.cpu_capability()} kernels, PyTorch {torch.__version__}")
    print_head("additive", ADDITIVE)
    for name, query, keys in additive_cases():
        # Weights neither so small that float32 has no logarithm of them nor so even that they hide the scores.
        v, values = torch.randn(A) * A**-0.5, torch.randn(B, S, A)
        ops = {"fused": attn_ext.additive_attention, "tanh": plain(attn_ext.additive_attention)}
        print_rows(name, ADDITIVE, ops, query, keys, v, values)
    torch.manual_seed(0)
    query, keys, v, values = torch.randn(B, T, A), torch.randn(B, S, A), torch.rand(A), torch.randn(B, S, A)
    print_rows("normal, v uniform in 0 to 1", ADDITIVE, ops, query, keys, v, values)
    ops = {"fused": attn_ext.dot_attention, "reference": plain(attn_ext.dot_attention)}
    print_head("dot", DOT)
    for name, query, memory in dot_cases():
        print_rows(name, DOT, ops, query, memory)
    print_head("dot, bfloat16", DOT)
    for name, query, memory in halves_cases():
        print_rows(name, DOT, ops, query, memory, dtype=torch.bfloat16)
    print_head("additive, bfloat16", ADDITIVE)
    ops = {"fused": attn_ext.additive_attention, "tanh": plain(attn_ext.additive_attention)}
    for steps in (S, 6 * S):
        for spread in (1, 0.05):
            query, keys = spread * torch.randn(B, T, A), spread * torch.randn(B, steps, A)
            v, values = torch.randn(A) * A**-0.5, torch.randn(B, steps, A)
            name = f"normal, standard deviation {spread}, S={steps}"
            print_rows(name, ADDITIVE, ops, query, keys, v, values, dtype=torch.bfloat16)


if __name__ == "__main__":
    with attn_ext.use_backend("fused"):
        main()
