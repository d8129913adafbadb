"""Calls of every op on the GPU, for tools that look at each memory access and for comparing runs bit by bit.

`python -m benchmarks.gpu_calls` makes each small call once. With `--repeat 10` it makes larger ones too, each so often,
and names those whose results' bits are not always the same. For a tool that breaks at a call, `--verbose` names each
before it is made, and `--only` spares the others.

`--products` is for tools that cuBLAS's products are too much for, with their bulk tensor copies: initcheck takes what
such a store wrote for uninitialised ("none"), racecheck breaks at some of halves ("float"). Left out are the loops of
general and concat, which project their queries, and scores in rows that such a store can write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

import attn_ext
from attn_ext import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = ((3, 1, 70, 33), (2, 1, 600, 64), (2, 1, 50, 512), (2, 37, 65, 40), (1, 130, 33, 8))  # B, T, S, D
# Rows of scores as the softmax has them: 16 or 32 elements a lane, four at once or each by itself, or a block's.
ROWS = ((2, 3, 300, 8), (1, 2, 509, 8), (1, 2, 1000, 8), (1, 2, 999, 8), (1, 2, 1100, 8))
WIDE_TILES = ((512, 17, 3, 8),)  # as many as additive scores' larger tiles wait for
LARGE = ((64, 1, 512, 1024), (32, 128, 128, 512), (3, 200, 1100, 136))
MASKINGS = ("none", "lengths", "rows", "pairs")
OPS = ("dot", "additive", "keyed_dot")
KINDS = (*OPS, "loops")
CALL = "call: "  # before a name, where they are told


def keyed_dot(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float | None = None, **options: Tensor | bool | None
) -> tuple[Tensor, Tensor | None]:
    """What is beneath general attention of more queries than steps: dot products with keys that are not the memory."""
    options = {"lengths": None, "mask": None, "need_weights": True} | options
    return functional.attend(query, values, keys, None, scale=1.0 if scale is None else scale, **options)


def sizes_of(op: str, large: bool, rows: bool) -> Sequence[tuple[int, int, int, int]]:
    small = {
        "dot": SMALL + (ROWS if rows else ()),
        "additive": SMALL + WIDE_TILES,
        "keyed_dot": SMALL[3:],  # one query is as good as more
    }
    return small[op] + (LARGE if large else ())


def of_an_op(
    op: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, masking: str, device: str
) -> Callable[[], list[Tensor]]:
    """Context, weights and every gradient of one call, on inputs that are the same at each."""
    B, T, S, D = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    options = {}
    if masking == "lengths":
        options["lengths"] = torch.randint(0, S + 1, (B,), generator=generator).to(device)
    elif masking != "none":
        size = (B, S) if masking == "rows" else (B, T, S)
        options["mask"] = (torch.rand(size, generator=generator) < 0.7).to(device)
    if op == "dot":
        inputs = [normal(B, T, D) / D**0.5, normal(B, S, D)]
    elif op == "keyed_dot":
        inputs = [normal(B, T, D) / D**0.5, normal(B, S, D), normal(B, S, D)]
    else:
        inputs = [normal(B, T, D), normal(B, S, D), normal(D) / D**0.5, normal(B, S, D)]
    attend = {"dot": attn_ext.dot_attention, "additive": attn_ext.additive_attention, "keyed_dot": keyed_dot}[op]
    gradients = [normal(B, T, D), normal(B, T, S)]

    def call() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = attend(*leaves, **options)
        return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, gradients))]

    return call


def of_a_loop(method: str, dtype: torch.dtype, device: str) -> Callable[[], list[Tensor]]:
    """A decoder's steps over one AttentionMemory, whose gradients come when all steps' are over."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 50, 24, generator=generator).to(device, dtype)
    hidden = torch.randn(4, 3, 24, generator=generator).to(device, dtype)
    lengths = torch.tensor([50, 17, 0], device=device)
    module = attn_ext.LuongAttention(method, 24)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    module = module.to(device, dtype)

    def call() -> list[Tensor]:
        leaves = [memory.detach().requires_grad_(), hidden.detach().requires_grad_(), *module.parameters()]
        prepared = module.memory(leaves[0], lengths)
        contexts = torch.stack([module(query, prepared)[0] for query in leaves[1]])
        return [x.detach() for x in (contexts, *torch.autograd.grad(contexts.square().sum(), leaves))]

    return call


def calls(
    device: str, large: bool = False, kinds: Sequence[str] = KINDS, products: str = "all"
) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """By name; `products` ("all", "float", "none") are the types of which a matrix product may store in bulk."""
    with_products = {"all": DTYPES, "float": (torch.float32, torch.float64), "none": ()}[products]
    for op, dtype in product([op for op in OPS if op in kinds], DTYPES):
        for i, sizes in enumerate(sizes_of(op, large, rows=dtype in with_products)):
            masking = MASKINGS[i % 4 - DTYPES.index(dtype)]
            name = f"{op} {sizes} {str(dtype).removeprefix('torch.')} masked by {masking}"
            yield name, of_an_op(op, sizes, dtype, masking, device)
    methods = ("dot", "general", "concat") if "loops" in kinds else ()
    for method, dtype in product(methods, (torch.float32, torch.bfloat16)):
        if method == "dot" or dtype in with_products:
            yield f"a loop of {method}, {str(dtype).removeprefix('torch.')}", of_a_loop(method, dtype, device)


def changes(call: Callable[[], list[Tensor]], repeats: int) -> list[int]:
    """The results that are not the same bits in every run."""
    first = call()
    changed = set()
    for _ in range(repeats - 1):
        for i, (one, other) in enumerate(zip(first, call(), strict=True)):
            if not torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
                changed.add(i)
    return sorted(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--products", choices=("all", "float", "none"), default="all")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    done = []
    with attn_ext.use_backend("fused"):
        for name, call in calls(arguments.device, arguments.repeat > 1, arguments.only, arguments.products):
            if arguments.verbose:
                print(f"{CALL}{name}", flush=True)
            done.append((name, changes(call, arguments.repeat)))
    different = [
        f"{name}: results {', '.join(map(str, which))} differ from run to run" for name, which in done if which
    ]
    for line in different:
        print(line)
    print(f"{len(done)} calls, {arguments.repeat} times each, {len(different)} of them not always the same")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
