"""Beam search: against all sentences there are, and the decoder's generate against a search over step loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import AttentionDecoder
from attn_ext.beam import BeamSearch

B, S, V, H, DM = 3, 6, 4, 8, 8
START, END = 0, 1
LENGTHS = torch.tensor([S, 3, 1])
DEVICE = LENGTHS.device


def worth(log_probability: float, length: int, length_penalty: float) -> float:
    return log_probability / ((5 + length) / 6) ** length_penalty


def build(**options: Any) -> AttentionDecoder:
    torch.manual_seed(0)
    decoder = AttentionDecoder(V, 5, H, memory_size=DM, **options).double()
    with torch.no_grad():
        decoder.output.weight.mul_(8)  # so that the sentences differ
    return decoder


def encoder_outputs() -> Tensor:
    return 2 * torch.randn(B, S, DM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def all_sentences(max_length: int) -> list[tuple[int, ...]]:
    """Those that end, and those of `max_length` that do not."""
    inner = [symbol for symbol in range(V) if symbol != END]
    ended = [(*s, END) for n in range(max_length) for s in itertools.product(inner, repeat=n)]
    return ended + list(itertools.product(inner, repeat=max_length))


def log_probability(decoder: AttentionDecoder, sentence: tuple[int, ...], b: int) -> tuple[float, Tensor]:
    """Of a sentence, by teacher forcing over batch element b alone; and its weights [n, S]."""
    read = torch.tensor([[START, *sentence[:-1]]])
    log_probs, _, weights = decoder(read, None, encoder_outputs()[b : b + 1], LENGTHS[b : b + 1])
    return log_probs[0, range(len(sentence)), list(sentence)].sum().item(), weights[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_default_dtype_decides_nothing(dtype: torch.dtype) -> None:
    """Scores of halves would no longer tell long hypotheses apart."""
    torch.manual_seed(0)
    decoder, memory = AttentionDecoder(50, 8, 16).to(torch.bfloat16), torch.randn(8, 5, 16).to(torch.bfloat16)
    options = {"start_symbol": 1, "max_length": 40, "beam_size": 4}
    expected, _ = decoder.generate(None, memory, **options)
    torch.set_default_dtype(dtype)
    try:
        symbols, _ = decoder.generate(None, memory, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(symbols, expected)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("options", [{}, {"cell": "lstm", "input_feeding": True, "num_layers": 2}], ids=["gru", "lstm"])
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
@torch.no_grad()
def test_wide_beams_find_the_best_sentence(
    method: str, options: dict[str, Any], length_penalty: float, each_backend: str
) -> None:
    """With a beam for every beginning the search is exact: no sentence of all is worth more."""
    max_length = 4
    decoder = build(method=method, **options)
    tokens, weights = decoder.generate(
        None,
        encoder_outputs(),
        LENGTHS,
        start_symbol=START,
        end_symbol=END,
        max_length=max_length,
        beam_size=V**max_length,
        length_penalty=length_penalty,
    )
    for b in range(B):
        # A sentence that has not ended is taken only where none has.
        scored = {}
        for sentence in all_sentences(max_length):
            if sentence[-1] == END:
                log_p, _ = log_probability(decoder, sentence, b)
                scored[sentence] = worth(log_p, len(sentence), length_penalty)
        best = max(scored, key=lambda sentence: scored[sentence])
        found = tokens[b].tolist()
        assert found[: len(best)] == list(best)
        assert set(found[len(best) :]) <= {END}
        torch.testing.assert_close(weights[b, : len(best)], log_probability(decoder, best, b)[1])
        assert not weights[b, len(best) :].any()


@torch.no_grad()
def plain_beam_search(
    decoder: AttentionDecoder, b: int, beam_size: int, max_length: int, length_penalty: float
) -> list[int]:
    """Of one sentence, hypothesis by hypothesis, each step taken from the start again."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(max_length):
        candidates = []
        for score, sentence in beams:
            read = torch.tensor([[START, *sentence]])
            log_probs = decoder(read, None, encoder_outputs()[b : b + 1], LENGTHS[b : b + 1])[0][0, -1]
            candidates += [(score + log_probs[symbol].item(), (*sentence, symbol)) for symbol in range(V)]
        candidates.sort(reverse=True)
        for score, sentence in candidates[:beam_size]:
            if sentence[-1] == END:
                ended.append((worth(score, len(sentence), length_penalty), sentence))
        beams = [(score, sentence) for score, sentence in candidates if sentence[-1] != END][:beam_size]
        if len(ended) >= beam_size:
            break
    return list(max(ended)[1] if ended else beams[0][1])


@pytest.mark.parametrize("beam_size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "options", [{}, {"cell": "lstm", "input_feeding": True}], ids=["gru", "lstm with input feeding"]
)
@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_generate_is_beam_search(method: str, options: dict[str, Any], beam_size: int) -> None:
    decoder = build(method=method, **options)
    tokens, _ = decoder.generate(
        None, encoder_outputs(), LENGTHS, start_symbol=START, end_symbol=END, max_length=7, beam_size=beam_size
    )
    for b in range(B):
        expected = plain_beam_search(decoder, b, beam_size, 7, 0.6)
        found = tokens[b].tolist()
        assert found[: len(expected)] == expected
        assert set(found[len(expected) :]) <= {END}


def test_length_penalty() -> None:
    """0.3 at once or 0.26 in two steps: the longer one is worth more from some penalty on."""
    found = {}
    for length_penalty in (0.0, 2.0):
        search = BeamSearch(1, 2, 5, END, length_penalty, DEVICE)
        first = torch.tensor([[[0.0, 0.3, 0.7, 0.0]]]).log().expand(1, 2, -1)
        search.advance(first, torch.ones(1, 2, 1))
        second = torch.tensor([[[0.63, 0.37, 0.0, 0.0]]]).log().expand(1, 2, -1)
        search.advance(second, torch.ones(1, 2, 1))
        found[length_penalty] = search.best()[0].tolist()
    assert found == {0.0: [[END]], 2.0: [[2, END]]}


def test_the_search_ends_when_nothing_can_win() -> None:
    """One certain sentence: the rest, of probability 0, is not waited for."""
    search = BeamSearch(1, 3, 50, END, 0.6, DEVICE)
    log_probs = torch.tensor([-1e4, 0.0, -1e4, -1e4]).expand(1, 3, -1)
    search.advance(log_probs, torch.ones(1, 3, 1))
    assert search.is_done()
    assert search.best()[0].tolist() == [[END]]


def advance(search: BeamSearch, *probabilities: list[float]) -> tuple[list[list[int]], list[int]]:
    """A step in which all beams of a sentence see the same probabilities [V]; symbols [B, K] and origins [B K]."""
    log_probs = torch.tensor(probabilities).log().unsqueeze(1).expand(-1, search.beam_size, -1)
    symbols, origins = search.advance(log_probs, torch.ones(len(probabilities), search.beam_size, 1))
    return symbols.tolist(), origins.tolist()


def test_as_many_can_end_as_go_on() -> None:
    """Both beams are likeliest to end, and both are followed all the same."""
    search = BeamSearch(1, 2, 5, END, 0.0, DEVICE)
    assert advance(search, [0.0, 0.0, 0.6, 0.4]) == ([[2, 3]], [0, 0])
    assert advance(search, [0.3, 0.6, 0.1, 0.0]) == ([[0, 0]], [0, 1])


def test_a_sentence_is_done_when_as_many_have_ended_as_it_has_beams() -> None:
    """Even where a longer one might be worth more; and the batch is done when all its sentences are."""
    ends, goes_on = [0.0, 0.4, 0.6, 0.0], [0.5, 0.0, 0.5, 0.0]
    alone, beside = (BeamSearch(batch_size, 2, 50, END, 2.0, DEVICE) for batch_size in (1, 2))
    for done in (False, True):
        advance(alone, ends)
        advance(beside, ends, goes_on)
        assert (alone.is_done(), beside.is_done()) == (done, False)


def test_a_sentence_that_is_done_takes_no_more() -> None:
    """The first one's third ending would be worth most, and comes only because the second goes on."""
    search = BeamSearch(2, 2, 5, END, 2.0, DEVICE)
    advance(search, [0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0])
    advance(search, [0.0, 0.51, 0.0, 0.49], [0.0, 0.0, 1.0, 0.0])
    assert not search.is_done()
    advance(search, [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
    assert search.best()[0].tolist() == [[2, END, END], [2, 2, END]]
    assert search.best()[1].squeeze(-1).tolist() == [[1, 1, 0], [1, 1, 1]]  # weights: two steps, and three


def test_memory_is_never_copied(each_backend: str) -> None:
    """The beams are queries of one memory: nothing of the size of memory times beams is made."""
    decoder = AttentionDecoder(V, 5, 16, method="dot").double()
    memory = torch.randn(2, 400, 16, dtype=torch.float64)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)
            )
            return result

    with Watch():
        decoder.generate(None, memory, start_symbol=START, end_symbol=END, max_length=4, beam_size=8)
    assert max(sizes) <= memory.untyped_storage().nbytes()


@pytest.mark.parametrize("end_symbol", [None, END])
def test_no_sentences(end_symbol: int | None) -> None:
    decoder = build()
    options = {"start_symbol": START, "end_symbol": end_symbol, "max_length": 3, "beam_size": 2}
    tokens, weights = decoder.generate(None, torch.zeros(0, S, DM).double(), **options)
    assert tokens.shape[0] == weights.shape[0] == 0


@torch.no_grad()
def test_more_beams_than_sentences() -> None:
    """Two symbols, two steps, 50 beams: the places that nothing fills stay empty, and the better ending is found."""
    decoder = AttentionDecoder(2, 3, 4).double()
    torch.manual_seed(3)  # behind what a device draws for itself
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    decoder.output.bias.copy_(torch.tensor([1.0, 0.0]))  # so that some end at once, and some do not
    hidden, memory = torch.randn(1, 8, 4).double(), torch.randn(8, 3, 4).double()
    options = {"start_symbol": START, "end_symbol": END, "max_length": 2, "beam_size": 50, "length_penalty": 2.0}
    tokens, _ = decoder.generate(hidden, memory, **options)
    log_probs, *_ = decoder(torch.full((8, 2), START), hidden, memory)  # what a sentence reads that begins with START
    at_once, later = log_probs[:, 0, END], log_probs[:, 0, START] + log_probs[:, 1, END]
    ends_later = later / (7 / 6) ** 2 > at_once
    assert 0 < ends_later.sum() < 8
    assert tokens.tolist() == [[START, END] if later else [END, END] for later in ends_later]


@pytest.mark.parametrize("name", ["beam_size", "length_penalty"])
@pytest.mark.parametrize("value", [-1, "2", True, float("nan"), None])
def test_wrong_arguments(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"AttentionDecoder: {name} "):
        build().generate(None, encoder_outputs(), start_symbol=START, max_length=3, **{name: value})


def test_beams_of_a_prepared_memory() -> None:
    decoder = build(method="concat")
    options = {"start_symbol": START, "end_symbol": END, "max_length": 6, "beam_size": 3}
    expected = decoder.generate(None, encoder_outputs(), LENGTHS, **options)
    memory = decoder.attention.memory(encoder_outputs(), LENGTHS)
    assert all(map(torch.equal, decoder.generate(None, memory, **options), expected))
    with attn_ext.use_backend("reference"):
        assert torch.equal(decoder.generate(None, encoder_outputs(), LENGTHS, **options)[0], expected[0])


@pytest.mark.parametrize("length_penalty", [1e4, 10**400], ids=["1e4", "10**400"])
def test_length_penalties_beyond_float32(length_penalty: float) -> None:
    """Of which all hypotheses would be worth 0."""
    with pytest.raises(ValueError, match=r"length_penalty is 1.*, needed is at most 240\.9 with max_length=3$"):
        generate_with_penalty(length_penalty)
    generate_with_penalty(240)


def generate_with_penalty(length_penalty: float) -> None:
    build().generate(
        None, encoder_outputs(), start_symbol=START, end_symbol=END, max_length=3, length_penalty=length_penalty
    )


def test_masks_are_of_the_memory_not_of_beams() -> None:
    """[B, T, S] with as many queries as beams: these change places, and their masks would not."""
    decoder = build(method="general")
    mask = torch.ones(B, 3, S, dtype=torch.bool)
    options = {"start_symbol": START, "max_length": 3}
    text = r"encoder_outputs has a mask of shape \[3, 3, 6\].*; needed is a mask \[B, S\]"
    for beam_size in (1, 3):
        with pytest.raises(ValueError, match=text):
            decoder.generate(
                None, decoder.attention.memory(encoder_outputs(), mask=mask), beam_size=beam_size, **options
            )
    decoder.generate(None, decoder.attention.memory(encoder_outputs(), mask=mask[:, 0]), beam_size=3, **options)
