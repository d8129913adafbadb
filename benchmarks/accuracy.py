"""How exact the additive op is: `python -m benchmarks.accuracy`.

Errors against the reference in float64, next to those of the reference in float32, which takes PyTorch's tanh of every
(query, step, feature). Scores are compared as the log of the weights, the gradients as they are; every error is divided
by the largest magnitude of its tensor, scores' by 1: an error of e in a score changes a weight by a factor of exp(e).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import attn_ext
from attn_ext import reference

B, T, S, A = 2, 24, 50, 512
TENSORS = ("scores", "context", "query", "keys", "v", "values")


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
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


def results(op: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    """In float64: the log of the weights, the context, and the gradients of the inputs."""
    inputs = tuple(tensor.to(dtype).requires_grad_() for tensor in inputs)
    context, weights = op(*inputs)
    grad_context = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(context, inputs, grad_context)
    return [tensor.detach().double() for tensor in (weights.double().log(), context, *grads)]


def errors(actual: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """The largest error of each tensor."""
    by_name = {}
    for name, result, truth in zip(TENSORS, actual, exact, strict=True):
        size = 1.0 if name == "scores" else truth.abs().max().item()
        by_name[name] = (result - truth).abs().max().item() / size
    return by_name


def main() -> None:
    print(f"B={B} T={T} S={S} A={A}, {torch.ops.attn_ext.cpu_capability()} kernels, PyTorch {torch.__version__}\n")
    print(f"| inputs | implementation | {' | '.join(TENSORS)} |\n|---|---|{'---|' * len(TENSORS)}")
    for name, query, keys in cases():
        # Weights neither so small that float32 has no logarithm of them nor so even that they hide the scores.
        v, values = torch.randn(A) * A**-0.5, torch.randn(B, S, A)
        exact = results(reference.additive_attention, torch.float64, query, keys, v, values)
        for label, op in (("fused", attn_ext.additive_attention), ("tanh", reference.additive_attention)):
            row = errors(results(op, torch.float32, query, keys, v, values), exact)
            print(f"| {name} | {label} | {' | '.join(f'{row[tensor]:.1e}' for tensor in TENSORS)} |")


if __name__ == "__main__":
    with attn_ext.use_backend("fused"):
        main()
