"""AttentionDecoder: shapes, one call against the step loop, hand-written loops, generate, padding, and wrong input."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_ext import AttentionDecoder, AttentionMemory
from attn_ext.decoder import DecoderState, HiddenState
from tests import cases

B, T, S, V, E, H, DM = 3, 5, 7, 11, 4, 6, 8
START, END = 0, 1
METHODS = ("dot", "general", "concat")
CELLS = ("gru", "lstm")
LENGTHS = torch.tensor([S, 4, 1])
DEVICE = LENGTHS.device

each_decoder = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("cell", CELLS),
    pytest.mark.parametrize("num_layers", [1, 2], ids="{}-layer".format),
    pytest.mark.parametrize("input_feeding", [False, True], ids=["plain", "input-feeding"]),
]


def for_each_decoder(test: Callable[..., None]) -> Callable[..., None]:
    for mark in each_decoder:
        test = mark(test)
    return test


def build(method: str = "dot", **options: Any) -> AttentionDecoder:
    """Weights of order 1, so that what is predicted depends on what is read."""
    torch.manual_seed(0)
    memory_size = H if method == "dot" else DM
    decoder = AttentionDecoder(V, E, H, method, memory_size=memory_size, **options).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)
    return decoder


def inputs(decoder: AttentionDecoder) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    shape = (decoder.rnn.num_layers, B, H)
    hidden = (normal(shape), normal(shape)) if isinstance(decoder.rnn, torch.nn.LSTM) else normal(shape)
    return {
        "targets": torch.randint(V, (B, T), generator=generator),
        "hidden": hidden,
        "encoder_outputs": normal(B, S, decoder.attention.memory_size),
    }


def leaves(hidden: HiddenState) -> list[Tensor]:
    """The tensors of a hidden state of any form."""
    return [hidden] if isinstance(hidden, Tensor) else [tensor for part in hidden for tensor in leaves(part)]


def step_loop(
    decoder: AttentionDecoder,
    targets: Tensor,
    hidden: HiddenState,
    encoder_outputs: Tensor | AttentionMemory,
    **options,
) -> tuple[Tensor, HiddenState, Tensor]:
    log_probs, weights = [], []
    for t in range(targets.shape[1]):
        now, hidden, weights_now = decoder.forward_step(targets[:, t : t + 1], hidden, encoder_outputs, **options)
        log_probs.append(now)
        weights.append(weights_now)
    return torch.stack(log_probs, dim=1), hidden, torch.cat(weights, dim=1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def gradients(loss: Tensor, decoder: AttentionDecoder, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Of every parameter, the hidden state and the encoder outputs."""
    tensors = dict(decoder.named_parameters()) | {"encoder_outputs": arguments["encoder_outputs"]}
    tensors |= {f"hidden[{i}]": tensor for i, tensor in enumerate(leaves(arguments["hidden"]))}
    return dict(zip(tensors, torch.autograd.grad(loss, tensors.values()), strict=True))


# the interface


@for_each_decoder
def test_shapes(method: str, cell: str, num_layers: int, input_feeding: bool, each_backend: str) -> None:
    decoder = build(method, cell=cell, num_layers=num_layers, input_feeding=input_feeding)
    arguments = inputs(decoder)
    targets, hidden, encoder_outputs = arguments.values()

    def check(log_probs: Tensor, state: HiddenState, weights: Tensor, steps: tuple[int, ...]) -> None:
        assert log_probs.shape == (B, *steps, V)
        assert weights.shape == (B, *(steps or (1,)), S)
        assert_near(log_probs.exp().sum(-1), torch.ones(B, *steps).double())
        assert_near(weights.sum(-1), torch.ones(B, *(steps or (1,))).double())
        assert isinstance(state, DecoderState) == input_feeding
        if input_feeding:
            assert state.attentional.shape == (B, H)
            state = state.hidden
        assert isinstance(state, tuple) == (cell == "lstm")
        assert all(tensor.shape == (num_layers, B, H) for tensor in leaves(state))

    check(*decoder.forward_step(targets[:, :1], hidden, encoder_outputs), ())
    check(*decoder(targets, hidden, encoder_outputs), (T,))
    check(*decoder(targets, hidden, encoder_outputs, LENGTHS, teacher_forcing_ratio=0.5), (T,))


def test_equations() -> None:
    """Luong 2015, eq. 5 and 6, with h_t before c_t."""
    decoder = build("general")
    targets, hidden, encoder_outputs = inputs(decoder).values()
    h, _ = decoder.rnn(decoder.embedding(targets), hidden)
    weights = torch.softmax(decoder.attention.Wa(h) @ encoder_outputs.transpose(1, 2), dim=-1)
    c = weights @ encoder_outputs
    attentional = torch.tanh(h @ decoder.Wc.weight[:, :H].T + c @ decoder.Wc.weight[:, H:].T)
    expected = torch.log_softmax(decoder.output(attentional), dim=-1)
    log_probs, _, actual_weights = decoder(targets, hidden, encoder_outputs)
    assert_near(log_probs, expected)
    assert_near(actual_weights, weights)


@for_each_decoder
def test_no_hidden_is_zeros(method: str, cell: str, num_layers: int, input_feeding: bool) -> None:
    decoder = build(method, cell=cell, num_layers=num_layers, input_feeding=input_feeding)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    zeros = [torch.zeros_like(tensor) for tensor in leaves(hidden)]
    expected, *_ = decoder(targets, tuple(zeros) if cell == "lstm" else zeros[0], encoder_outputs)
    assert torch.equal(decoder(targets, None, encoder_outputs)[0], expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_token_dtypes(dtype: torch.dtype) -> None:
    decoder = build()
    targets, hidden, encoder_outputs = inputs(decoder).values()
    expected, *_ = decoder(targets, hidden, encoder_outputs)
    assert torch.equal(decoder(targets.to(dtype), hidden, encoder_outputs)[0], expected)
    decoder(targets.to(dtype), hidden, encoder_outputs, teacher_forcing_ratio=0.5)


def test_state_dict_round_trip() -> None:
    options = {"cell": "lstm", "num_layers": 2, "input_feeding": True}
    decoder, other = build("concat", **options), build("concat", **options)
    arguments = inputs(decoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(**arguments)[0], decoder(**arguments)[0])
    assert {name.split(".")[0] for name in decoder.state_dict()} == {"embedding", "rnn", "attention", "Wc", "output"}


# teacher forcing


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
@for_each_decoder
def test_one_call_is_the_step_loop(
    method: str, cell: str, num_layers: int, input_feeding: bool, lengths: Tensor | None, each_backend: str
) -> None:
    decoder = build(method, cell=cell, num_layers=num_layers, input_feeding=input_feeding)
    arguments = inputs(decoder)
    outputs = [decoder(**arguments, lengths=lengths), step_loop(decoder, **arguments, lengths=lengths)]
    weighting = torch.randn(outputs[0][0].shape).double()
    actual, expected = (
        gradients((log_probs * weighting).sum() + weights.square().sum(), decoder, arguments)
        for log_probs, _, weights in outputs
    )
    (log_probs, hidden, weights), (expected_log_probs, expected_hidden, expected_weights) = outputs
    assert_near(log_probs, expected_log_probs)
    assert_near(weights, expected_weights)
    for tensor, other in zip(leaves(hidden), leaves(expected_hidden), strict=True):
        assert_near(tensor, other)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11, msg=partial("{}: {}".format, name))
        assert gradient.count_nonzero() > 0, name


@pytest.mark.parametrize("input_feeding", [False, True])
def test_calls_of_the_layers(input_feeding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without input feeding, T steps are one RNN call, one attention call and no AttentionMemory."""
    decoder = build("concat", input_feeding=input_feeding)
    calls: list[str] = []
    decoder.rnn.register_forward_hook(lambda *_: calls.append("rnn"))
    decoder.attention.register_forward_hook(lambda *_: calls.append("attention"))
    make_memory = decoder.attention.memory
    monkeypatch.setattr(decoder.attention, "memory", lambda *a: (calls.append("memory"), make_memory(*a))[1])
    decoder(**inputs(decoder))
    assert calls == (["memory", *["rnn", "attention"] * T] if input_feeding else ["rnn", "attention"])


def test_one_call_goes_on_where_another_ended() -> None:
    decoder = build("general", cell="lstm", input_feeding=True)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    expected, *_ = decoder(targets, hidden, encoder_outputs)
    first, state, _ = decoder(targets[:, :2], hidden, encoder_outputs)
    second, *_ = decoder(targets[:, 2:], state, encoder_outputs)
    assert_near(torch.cat([first, second], dim=1), expected)


@pytest.mark.parametrize("method", METHODS)
def test_input_feeding_against_a_loop_of_layers(method: str) -> None:
    """Luong 2015, section 3.3: the RNN reads [embedded; h~ of the step before]."""
    decoder = build(method, input_feeding=True, num_layers=2)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    actual, state, _ = decoder(targets, hidden, encoder_outputs)
    fed = torch.zeros(B, H).double()
    for t in range(T):
        h, hidden = decoder.rnn(torch.cat([decoder.embedding(targets[:, t]), fed], dim=-1).unsqueeze(1), hidden)
        c, _ = decoder.attention(h.squeeze(1), encoder_outputs)
        fed = torch.tanh(decoder.Wc(torch.cat([h.squeeze(1), c], dim=-1)))
        assert_near(actual[:, t], torch.log_softmax(decoder.output(fed), dim=-1))
    assert_near(state.attentional, fed)
    assert_near(state.hidden, hidden)


# scheduled sampling


@for_each_decoder
def test_ratio_0_is_the_greedy_path(
    method: str, cell: str, num_layers: int, input_feeding: bool, each_backend: str
) -> None:
    decoder = build(method, cell=cell, num_layers=num_layers, input_feeding=input_feeding)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    targets[:, 0] = START
    targets[:, 1:] = -100  # never read
    log_probs, _, weights = decoder(targets, hidden, encoder_outputs, LENGTHS, teacher_forcing_ratio=0)
    tokens, greedy_weights = decoder.generate(hidden, encoder_outputs, LENGTHS, start_symbol=START, max_length=T)
    assert torch.equal(log_probs.argmax(dim=-1), tokens)
    assert_near(weights, greedy_weights)


def test_ratio_below_1_draws_for_every_sentence_and_step() -> None:
    decoder = build()
    sentences, steps, ratio = 400, 6, 0.7
    read: list[Tensor] = []
    decoder.embedding.register_forward_hook(lambda module, tokens, output: read.append(tokens[0]))
    # The model never predicts what it is told to read: the two are told apart.
    targets = torch.full((sentences, steps), V - 1)
    with torch.no_grad():
        decoder.output.bias[V - 1] = -1e3
    decoder(targets, None, torch.randn(sentences, S, H).double(), teacher_forcing_ratio=ratio)
    is_forced = torch.cat(read, dim=1) == V - 1  # [sentences, steps]
    assert is_forced[:, 0].all()
    drawn = is_forced[:, 1:].double()
    deviation = (ratio * (1 - ratio) / drawn.numel()) ** 0.5
    assert abs(drawn.mean().item() - ratio) < 4 * deviation
    # Independent along both axes: neither sentences nor steps agree with each other more than chance has it.
    assert drawn.mean(dim=0).std() < 4 * (ratio * (1 - ratio) / sentences) ** 0.5
    assert 0.2 < drawn.mean(dim=1).var() / (ratio * (1 - ratio) / drawn.shape[1]) < 2


def test_ratio_follows_the_seed() -> None:
    decoder = build()
    arguments = inputs(decoder)
    first, again, other = (
        (torch.manual_seed(seed), decoder(**arguments, teacher_forcing_ratio=0.5))[1][0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_ratio_of_any_number_type() -> None:
    decoder = build()
    expected, same = (
        (torch.manual_seed(0), decoder(**inputs(decoder), teacher_forcing_ratio=ratio))[1][0]
        for ratio in (0.5, Fraction(1, 2))
    )
    assert torch.equal(expected, same)


def test_ratio_1_draws_nothing() -> None:
    decoder = build(input_feeding=True)
    state = torch.get_rng_state()
    decoder(**inputs(decoder))
    assert torch.equal(torch.get_rng_state(), state)


# generate


@for_each_decoder
def test_generate_is_the_greedy_step_loop(method: str, cell: str, num_layers: int, input_feeding: bool) -> None:
    decoder = build(method, cell=cell, num_layers=num_layers, input_feeding=input_feeding)
    _, hidden, encoder_outputs = inputs(decoder).values()
    tokens, weights = decoder.generate(hidden, encoder_outputs, LENGTHS, start_symbol=START, max_length=9)
    assert tokens.shape == (B, 9)
    assert tokens.dtype == torch.int64
    assert weights.shape == (B, 9, S)
    assert not weights.requires_grad
    read = torch.cat([torch.full((B, 1), START), tokens[:, :-1]], dim=1)
    log_probs, _, expected_weights = step_loop(decoder, read, hidden, encoder_outputs, lengths=LENGTHS)
    assert torch.equal(tokens, log_probs.argmax(dim=-1))
    assert_near(weights, expected_weights)


def counting_decoder() -> AttentionDecoder:
    """After symbol n it predicts n - 1, whatever else it reads; after 0, 0."""
    decoder = AttentionDecoder(V, V, V)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.embedding.weight.copy_(torch.eye(V))
        decoder.rnn.weight_ih_l0[2 * V :] = 10 * torch.eye(V)  # the candidate state; the gates stay at one half
        decoder.Wc.weight[:, :V] = torch.eye(V)
        decoder.output.weight[torch.arange(V).sub(1).clamp(min=0), torch.arange(V)] = 10
    return decoder


@pytest.mark.parametrize("end_symbol", range(V))
def test_generate_fills_up_after_the_end(end_symbol: int) -> None:
    decoder = build("concat")
    encoder_outputs = 3 * torch.randn(5, S, DM, generator=torch.Generator().manual_seed(2)).double()
    options = {"start_symbol": START, "max_length": 8}
    expected, expected_weights = decoder.generate(None, encoder_outputs, **options)
    is_end = expected == end_symbol
    expected = expected.masked_fill(is_end.cumsum(dim=1) > 0, end_symbol)
    steps = int(is_end.cumsum(dim=1).eq(0).sum(dim=1).max()) + 1  # to the last sentence's end
    tokens, weights = decoder.generate(None, encoder_outputs, end_symbol=end_symbol, **options)
    assert tokens.tolist() == expected[:, :steps].tolist()
    assert_near(weights[:, 0], expected_weights[:, 0])
    assert weights.shape == (5, tokens.shape[1], S)


def test_generate_stops_when_all_have_ended() -> None:
    tokens, weights = counting_decoder().generate(
        None, torch.zeros(2, S, V), start_symbol=5, end_symbol=2, max_length=20
    )
    assert tokens.tolist() == [[4, 3, 2]] * 2
    assert weights.shape == (2, 3, S)


def test_generate_without_an_end() -> None:
    tokens, _ = counting_decoder().generate(None, torch.zeros(1, S, V), start_symbol=3, max_length=5)
    assert tokens.tolist() == [[2, 1, 0, 0, 0]]


def test_generate_takes_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    tokens, _ = counting_decoder().generate(
        None, torch.zeros(1, S, V), start_symbol=numpy.int64(3), end_symbol=numpy.int32(0), max_length=numpy.int64(5)
    )
    assert tokens.tolist() == [[2, 1, 0]]


# memory and padding


@pytest.mark.parametrize("input_feeding", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_lengths_hide_what_is_behind_them(method: str, input_feeding: bool, each_backend: str) -> None:
    decoder = build(method, input_feeding=input_feeding)
    arguments = inputs(decoder)
    is_padding = torch.arange(S) >= LENGTHS.unsqueeze(1)
    results = []
    for padding in (0.0, float("nan"), float("inf")):
        encoder_outputs = arguments["encoder_outputs"].detach().masked_fill(is_padding.unsqueeze(-1), padding)
        arguments["encoder_outputs"] = encoder_outputs.requires_grad_()
        log_probs, _, weights = decoder(**arguments, lengths=LENGTHS)
        assert weights[is_padding.unsqueeze(1).expand_as(weights)].count_nonzero() == 0
        found = gradients(log_probs.square().sum(), decoder, arguments)
        assert found["encoder_outputs"][is_padding].count_nonzero() == 0
        results.append({"log_probs": log_probs, "weights": weights} | found)
    for result, name in itertools.product(results[1:], results[0]):
        assert_near(result[name], results[0][name])


@pytest.mark.parametrize("input_feeding", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_memory_instead_of_encoder_outputs(method: str, input_feeding: bool, each_backend: str) -> None:
    decoder = build(method, input_feeding=input_feeding)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    memory = decoder.attention.memory(encoder_outputs, LENGTHS)
    for ratio in (1.0, 0.0):
        expected, *_ = decoder(targets, hidden, encoder_outputs, LENGTHS, teacher_forcing_ratio=ratio)
        assert_near(decoder(targets, hidden, memory, teacher_forcing_ratio=ratio)[0], expected)
    assert_near(step_loop(decoder, targets, hidden, memory)[0], decoder(targets, hidden, encoder_outputs, LENGTHS)[0])
    options = {"start_symbol": START, "max_length": T}
    expected_tokens, _ = decoder.generate(hidden, encoder_outputs, LENGTHS, **options)
    assert torch.equal(decoder.generate(hidden, memory, **options)[0], expected_tokens)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_for_every_step(method: str, each_backend: str) -> None:
    """[B, T, S] over the steps of the targets, at once and one by one, to the same numbers and gradients."""
    arguments = inputs(decoder := build(method))
    targets, hidden, encoder_outputs = arguments.values()
    mask = torch.rand(B, T, S, generator=torch.Generator().manual_seed(2)) < 0.6
    whole, *_ = decoder(targets, hidden, decoder.attention.memory(encoder_outputs, mask=mask))
    memory, state, parts = decoder.attention.memory(encoder_outputs, mask=mask), hidden, []
    for t in range(T):
        log_probs, state, weights = decoder.forward_step(targets[:, t : t + 1], state, memory._of_step(t))
        assert (weights[:, 0][~mask[:, t]] == 0).all()
        parts.append(log_probs)
    assert_near(torch.stack(parts, 1), whole)
    expected = gradients(whole.sum(), decoder, arguments)
    for name, grad in gradients(torch.stack(parts, 1).sum(), decoder, arguments).items():
        assert_near(grad, expected[name])
    _, _, weights = decoder(targets, hidden, memory, teacher_forcing_ratio=0.5)
    assert (weights[~mask] == 0).all()
    fed = build(method, input_feeding=True)
    _, _, weights = fed(targets, hidden, fed.attention.memory(encoder_outputs, mask=mask))
    assert (weights[~mask] == 0).all()
    short = fed.attention.memory(encoder_outputs, mask=mask[:, 1:])
    text = rf"^AttentionDecoder: mask has shape \[3, {T - 1}, 7\], needed is \[B, T, S\]"
    with pytest.raises(ValueError, match=text):
        fed(targets, hidden, short)
    with pytest.raises(ValueError, match=text):
        decoder(targets, hidden, decoder.attention.memory(encoder_outputs, mask=mask[:, 1:]))


def test_a_memory_of_another_decoder() -> None:
    """Its parameters would be attended with, and trained, unnoticed."""
    decoder, other = build("general"), build("general")
    targets, hidden, encoder_outputs = inputs(decoder).values()
    text = "^AttentionDecoder: encoder_outputs is an AttentionMemory that another module made"
    with pytest.raises(ValueError, match=text):
        decoder(targets, hidden, other.attention.memory(encoder_outputs))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("input_feeding", [False, True])
@pytest.mark.parametrize(("batch_size", "steps"), [(0, T), (B, 0), (0, 0)])
def test_zero_sizes(cell: str, input_feeding: bool, batch_size: int, steps: int, each_backend: str) -> None:
    decoder = build("concat", cell=cell, input_feeding=input_feeding)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    targets, encoder_outputs = targets[:batch_size, :steps], encoder_outputs[:batch_size]
    parts = [tensor[:, :batch_size] for tensor in leaves(hidden)]
    hidden = tuple(parts) if cell == "lstm" else parts[0]
    for ratio in (1.0, 0.5):
        log_probs, state, weights = decoder(targets, hidden, encoder_outputs, teacher_forcing_ratio=ratio)
        assert log_probs.shape == (batch_size, steps, V)
        assert weights.shape == (batch_size, steps, S)
        if input_feeding:
            assert state.attentional.shape == (batch_size, H)
            state = state.hidden
        assert all(map(torch.equal, leaves(state), parts))
        log_probs.sum().backward()
    if batch_size == 0:
        log_probs, _, weights = decoder.forward_step(torch.zeros(0, 1, dtype=torch.int64), hidden, encoder_outputs)
        assert log_probs.shape == (0, V)
        tokens, _ = decoder.generate(hidden, encoder_outputs, start_symbol=START, end_symbol=END, max_length=T)
        assert tokens.shape[0] == 0


# dropout, dtypes, layouts


@pytest.mark.parametrize("num_layers", [1, 2])
def test_dropout(num_layers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nn.GRU's, about dropout between the layers of one
        decoder = build(num_layers=num_layers, dropout=0.5)
    arguments = inputs(decoder)
    assert not torch.equal(decoder(**arguments)[0], decoder(**arguments)[0])
    decoder.eval()
    without = build(num_layers=num_layers)
    assert torch.equal(decoder(**arguments)[0], without(**arguments)[0])


@pytest.mark.cpu  # what cuDNN makes of a share of all is its own
def test_dropout_has_three_places() -> None:
    """With a share of all: nothing of the embedded symbols, of the first layer or of h~ goes on."""
    decoder = build(num_layers=2, dropout=1.0)
    read: dict[torch.nn.Module, Tensor] = {}
    for layer in (decoder.rnn, decoder.output):
        layer.register_forward_pre_hook(lambda layer, arguments: read.update({layer: arguments[0]}))
    targets, hidden, encoder_outputs = inputs(decoder).values()
    _, state, _ = decoder(targets, hidden, encoder_outputs)
    assert not read[decoder.rnn].any()
    assert not read[decoder.output].any()
    _, another_state, _ = decoder(targets, hidden * torch.tensor([-1, 1]).view(2, 1, 1), encoder_outputs)
    assert [torch.equal(*layer) for layer in zip(state, another_state, strict=True)] == [False, True]


def test_dropout_spares_what_input_feeding_carries() -> None:
    decoder = build(input_feeding=True, dropout=1.0)
    _, state, _ = decoder(**inputs(decoder))
    assert state.attentional.count_nonzero() == B * H


def runs_under_autocast(cell: str) -> bool:
    """Whether PyTorch's own recurrent layer does: its LSTM asks oneDNN for one of bfloat16, which needs AVX-512."""
    layer = torch.nn.LSTM(2, 2) if cell == "lstm" else torch.nn.GRU(2, 2)
    try:
        with torch.autocast(cases.DEVICE, torch.bfloat16):
            layer(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("input_feeding", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, cell: str, input_feeding: bool, each_backend: str) -> None:
    if not runs_under_autocast(cell):
        pytest.skip(f"PyTorch's own {cell} does not run under autocast on this processor")
    decoder = build(method, cell=cell, input_feeding=input_feeding)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    exact, *_ = decoder(targets, hidden, encoder_outputs)
    decoder.float()
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        log_probs, state, _ = decoder(targets, None, encoder_outputs.bfloat16())
        decoder(targets, state, encoder_outputs.float())
        decoder.forward_step(targets[:, :1], state, encoder_outputs.bfloat16())
        decoder.generate(state, encoder_outputs.float(), start_symbol=START, max_length=T)
        single = tuple(part.float() for part in leaves(hidden))
        log_probs, *_ = decoder(targets, single if cell == "lstm" else single[0], encoder_outputs.float())
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), exact, atol=0.2, rtol=0.1)
    log_probs.sum().backward()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_memory_under_autocast(where: str, each_backend: str) -> None:
    """Made where the decoder runs, or before that."""
    decoder = build("concat").float()
    targets, _, encoder_outputs = inputs(decoder).values()
    expected, *_ = decoder(targets, None, encoder_outputs.float())
    memory = decoder.attention.memory(encoder_outputs.float())
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        if where == "inside":
            memory = decoder.attention.memory(encoder_outputs.float())
        log_probs, *_ = decoder(targets, None, memory)
    torch.testing.assert_close(log_probs, expected, atol=0.2, rtol=0.1)
    if where == "inside":
        with pytest.raises(TypeError, match=r"encoder_outputs is torch\.bfloat16, as torch\.autocast made it, but"):
            decoder(targets, None, memory)


def test_checks_cast_nothing() -> None:
    """Under autocast, a step casts the output layer's matrix for its product and for nothing else."""
    decoder = build().float()
    casts = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func == torch.ops.aten._to_copy.default:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast(cases.DEVICE, torch.bfloat16, cache_enabled=False), Watch():
        decoder.forward_step(torch.zeros(B, 1, dtype=torch.int64), None, torch.zeros(B, S, H))
    assert casts.count(decoder.output.weight.shape) == 1


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_quantized(method: str, cell: str) -> None:
    """Those that are called become layers of 8-bit products; the attention's matrix, which is read, stays as it is."""
    quantization = pytest.importorskip("torch.ao.quantization")
    decoder = build(method, input_feeding=True, cell=cell).float().eval()
    targets, _, encoder_outputs = inputs(decoder).values()
    expected, *_ = decoder(targets, None, encoder_outputs.float())
    quantized = quantization.quantize_dynamic(decoder, {torch.nn.Linear, torch.nn.LSTM})
    assert not isinstance(quantized.output, torch.nn.Linear)
    log_probs, *_ = quantized(targets, None, encoder_outputs.float())
    torch.testing.assert_close(log_probs, expected, atol=0.5, rtol=0.1)
    quantized.generate(None, encoder_outputs.float(), start_symbol=START, max_length=3, beam_size=2)


def test_bfloat16() -> None:
    decoder = build("concat").bfloat16()
    log_probs, hidden, weights = decoder(torch.zeros(B, T, dtype=torch.int64), None, torch.randn(B, S, DM).bfloat16())
    assert {log_probs.dtype, hidden.dtype, weights.dtype} == {torch.bfloat16}


def test_strides() -> None:
    """A time-major memory and a batch-major hidden state, as transposed views."""
    decoder = build("general", num_layers=2)
    targets, hidden, encoder_outputs = inputs(decoder).values()
    expected, *_ = decoder(targets, hidden, encoder_outputs)
    time_major = encoder_outputs.transpose(0, 1).contiguous().transpose(0, 1)
    batch_major = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert_near(decoder(targets.T.contiguous().T, batch_major, time_major)[0], expected)


# wrong input


def construct(**changes: Any) -> object:
    return AttentionDecoder(**{"vocab_size": V, "embedding_size": E, "hidden_size": H} | changes)


def call(method: str = "dot", options: dict[str, Any] | None = None, **changes: Any) -> object:
    decoder = build(method, **(options or {}))
    return decoder(**inputs(decoder) | changes)


def step(**changes: Any) -> object:
    decoder = build()
    targets, hidden, encoder_outputs = inputs(decoder).values()
    arguments = {"decoder_input": targets[:, :1], "decoder_hidden": hidden, "encoder_outputs": encoder_outputs}
    return decoder.forward_step(**arguments | changes)


def generate(**changes: Any) -> object:
    decoder = build()
    _, hidden, encoder_outputs = inputs(decoder).values()
    arguments = {"hidden": hidden, "encoder_outputs": encoder_outputs, "start_symbol": START, "max_length": T}
    return decoder.generate(**arguments | changes)


zeros = partial(torch.zeros, dtype=torch.float64)
ids = partial(torch.zeros, dtype=torch.int64)
lstm, feeding = {"cell": "lstm"}, {"input_feeding": True}

# call, error, its text
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    # the constructor
    (lambda: construct(vocab_size=0), ValueError, "AttentionDecoder: vocab_size is 0, needed is at least 1"),
    (
        lambda: construct(embedding_size=2.0),
        TypeError,
        "AttentionDecoder: embedding_size must be an integer, got float",
    ),
    (lambda: construct(hidden_size=-1), ValueError, "AttentionDecoder: hidden_size is -1, needed is at least 1"),
    (lambda: construct(num_layers=0), ValueError, "AttentionDecoder: num_layers is 0, needed is at least 1"),
    (lambda: construct(memory_size=0), ValueError, "AttentionDecoder: memory_size is 0, needed is at least 1"),
    (lambda: construct(cell="rnn"), ValueError, "AttentionDecoder: cell is 'rnn', needed is one of 'gru', 'lstm'"),
    (lambda: construct(dropout=1.5), ValueError, "AttentionDecoder: dropout is 1.5, needed is 0 <= dropout <= 1"),
    (lambda: construct(dropout="0"), TypeError, "AttentionDecoder: dropout must be a number, got str"),
    (lambda: construct(method="cos"), ValueError, "method is 'cos', needed is one of 'dot', 'general', 'concat'"),
    (lambda: construct(memory_size=DM), ValueError, "method='dot' needs memory_size equal to hidden_size=6, got 8"),
    (
        lambda: construct(input_feeding="no"),
        TypeError,
        "AttentionDecoder: input_feeding must be True or False, got str",
    ),
    # tokens
    (lambda: call(targets=[[1]]), TypeError, "AttentionDecoder: targets must be a torch.Tensor, got list"),
    (lambda: call(targets=zeros(B, T)), TypeError, "targets must be int64 or int32, got torch.float64"),
    (lambda: call(targets=ids(B)), ValueError, "targets has shape [3], needed is [B, T]"),
    (
        lambda: call(targets=ids(B, T, device="meta")),
        ValueError,
        f"targets is on meta, but the decoder is on {DEVICE}",
    ),
    (
        lambda: step(decoder_input=ids(B, 2)),
        ValueError,
        "decoder_input has shape [3, 2], needed is [B, T] with T=1 (from one decoder step)",
    ),
    (lambda: step(decoder_input=zeros(B, 1)), TypeError, "decoder_input must be int64 or int32, got torch.float64"),
    # teacher_forcing_ratio
    (
        lambda: call(teacher_forcing_ratio=1.1),
        ValueError,
        "AttentionDecoder: teacher_forcing_ratio is 1.1, needed is 0 <= teacher_forcing_ratio <= 1",
    ),
    (lambda: call(teacher_forcing_ratio=float("nan")), ValueError, "teacher_forcing_ratio is nan, needed is"),
    (lambda: call(teacher_forcing_ratio=None), TypeError, "teacher_forcing_ratio must be a number, got NoneType"),
    (lambda: call(teacher_forcing_ratio=True), TypeError, "teacher_forcing_ratio must be a number, got bool"),
    # hidden
    (lambda: call(hidden="h"), TypeError, "AttentionDecoder: hidden must be a torch.Tensor, got str"),
    (lambda: call(hidden=(zeros(1, B, H),) * 2), TypeError, "hidden must be a torch.Tensor, got tuple"),
    (lambda: call(hidden=torch.zeros(1, B, H)), TypeError, "hidden is torch.float32, but the decoder is torch.float64"),
    (
        lambda: call(hidden=zeros(2, B, H)),
        ValueError,
        "hidden has shape [2, 3, 6], needed is [L, B, H] with L=1 (from num_layers), B=3 (from targets), "
        "H=6 (from hidden_size)",
    ),
    (lambda: call(hidden=zeros(1, 2, H)), ValueError, "hidden has shape [1, 2, 6], needed is [L, B, H]"),
    (lambda: call(hidden=zeros(B, H)), ValueError, "hidden has shape [3, 6], needed is [L, B, H]"),
    (
        lambda: step(decoder_hidden=zeros(1, B, 5)),
        ValueError,
        "decoder_hidden has shape [1, 3, 5], needed is [L, B, H]",
    ),
    (
        lambda: call(options=lstm, hidden=zeros(1, B, H)),
        TypeError,
        "hidden must be the tuple (h, c) of an LSTM, got Tensor",
    ),
    (
        lambda: call(options=lstm, hidden=(zeros(1, B, H),) * 3),
        TypeError,
        "hidden must be the tuple (h, c) of an LSTM, got tuple of 3",
    ),
    (
        lambda: call(options=lstm | {"input_feeding": True}, hidden=DecoderState(zeros(1, B, H), zeros(B, H))),
        TypeError,
        "hidden.hidden must be the tuple (h, c) of an LSTM, got Tensor",
    ),
    (
        lambda: call(options={"input_feeding": True}, hidden=(zeros(1, B, H), zeros(B, H))),
        TypeError,
        "hidden must be a torch.Tensor, or with input feeding a DecoderState, got tuple of 2",
    ),
    (
        lambda: call(options=lstm, hidden=(zeros(1, B, H), zeros(1, B, 5))),
        ValueError,
        "hidden[1] has shape [1, 3, 5], needed is [L, B, H]",
    ),
    (
        lambda: call(options=lstm, hidden=(zeros(1, B, H), None)),
        TypeError,
        "hidden[1] must be a torch.Tensor, got None",
    ),
    (
        lambda: call(hidden=DecoderState(zeros(1, B, H), zeros(B, H))),
        TypeError,
        "hidden must be a torch.Tensor, got DecoderState",
    ),
    (
        lambda: call(options=feeding, hidden=DecoderState(zeros(1, B, H), zeros(B, 5))),
        ValueError,
        "hidden.attentional has shape [3, 5], needed is [B, H] with B=3 (from targets), H=6 (from hidden_size)",
    ),
    # encoder_outputs and lengths
    (lambda: call(encoder_outputs=None), TypeError, "encoder_outputs must be a torch.Tensor, got NoneType"),
    (
        lambda: call(encoder_outputs=torch.zeros(B, S, H)),
        TypeError,
        "encoder_outputs is torch.float32, but the decoder",
    ),
    (
        lambda: call(encoder_outputs=zeros(2, S, H)),
        ValueError,
        "encoder_outputs has shape [2, 7, 6], needed is [B, S, Dm] with B=3 (from targets), Dm=6 (from memory_size)",
    ),
    (lambda: call(encoder_outputs=zeros(B, S, DM)), ValueError, "encoder_outputs has shape [3, 7, 8], needed is"),
    (
        lambda: call(encoder_outputs=AttentionMemory(zeros(B, S, DM))),
        ValueError,
        "encoder_outputs has shape [3, 7, 8], needed is [B, S, Dm] with B=3 (from targets), Dm=6 (from memory_size)",
    ),
    (
        lambda: call(encoder_outputs=AttentionMemory(zeros(2, S, H))),
        ValueError,
        "encoder_outputs has shape [2, 7, 6], needed is [B, S, Dm]",
    ),
    (
        lambda: call(encoder_outputs=AttentionMemory(zeros(B, S, H), "general", weight=zeros(H, H))),
        ValueError,
        "AttentionDecoder: encoder_outputs.method is 'general', needed is one of 'dot'",
    ),
    *(
        (
            lambda ratio=ratio: call(
                encoder_outputs=AttentionMemory(zeros(B, S, H)), lengths=LENGTHS, teacher_forcing_ratio=ratio
            ),
            ValueError,
            "AttentionDecoder: encoder_outputs is an AttentionMemory, which has its own lengths: lengths must",
        )
        for ratio in (0.0, 1.0)
    ),
    (
        lambda: call(lengths=[1, 2]),
        ValueError,
        "AttentionDecoder: lengths has shape [2], needed is [B] with B=3 (from t",
    ),
    (
        lambda: call(lengths=[1, 2, 8]),
        ValueError,
        "AttentionDecoder: lengths go from 1 to 8, needed is 0 <= length <= S=7 (from e",
    ),
    (lambda: call(lengths=[1.0, 2.0, 3.0]), TypeError, "AttentionDecoder: lengths must be integers"),
    # generate
    (
        lambda: generate(start_symbol=V),
        ValueError,
        "start_symbol has the symbol 11, needed is 0 <= symbol < vocab_size=11",
    ),
    (lambda: generate(start_symbol=0.0), TypeError, "AttentionDecoder: start_symbol must be an integer, got float"),
    (lambda: generate(end_symbol=-1), ValueError, "end_symbol has the symbol -1, needed is 0 <= symbol"),
    (lambda: generate(max_length=0), ValueError, "AttentionDecoder: max_length is 0, needed is at least 1"),
    (lambda: generate(max_length=2.5), TypeError, "AttentionDecoder: max_length must be an integer, got float"),
    (lambda: generate(hidden=zeros(1, 2, H)), ValueError, "B=3 (from encoder_outputs)"),
]


@pytest.mark.parametrize(("wrong_call", "error", "text"), ERRORS, ids=[text[:60] for _, _, text in ERRORS])
def test_error(wrong_call: Callable[[], object], error: type[Exception], text: str, each_backend: str) -> None:
    with pytest.raises(error) as caught:
        wrong_call()
    assert text in str(caught.value)


@pytest.mark.cpu
@pytest.mark.parametrize("symbol", [V, -1])
def test_symbols_out_of_range(symbol: int, each_backend: str) -> None:
    with pytest.raises(ValueError, match=f"targets has the symbol {symbol}, needed is 0 <= symbol < vocab_size={V}$"):
        call(targets=ids(B, T) + symbol)
