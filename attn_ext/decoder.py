"""AttentionDecoder: a recurrent decoder with Luong's global attention."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from attn_ext import checks
from attn_ext.beam import BeamSearch
from attn_ext.memory import AttentionMemory
from attn_ext.modules import LuongAttention

RnnState: TypeAlias = Tensor | tuple[Tensor, Tensor]
_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class DecoderState(NamedTuple):
    """What input feeding carries from one step to the next."""

    hidden: RnnState  # the RNN's own: [L, B, H], of an LSTM the (h, c) of it
    attentional: Tensor  # [B, H], the h~ of the step before


HiddenState: TypeAlias = RnnState | DecoderState


def _rows(state: HiddenState, rows: Tensor) -> HiddenState:
    """The sentences `rows` of a state."""
    if isinstance(state, DecoderState):
        return DecoderState(_rows(state.hidden, rows), state.attentional[rows])
    if isinstance(state, tuple):
        hidden, cell = state
        return hidden[:, rows], cell[:, rows]
    return state[:, rows]


class AttentionDecoder(nn.Module):
    """Predicts a target sequence symbol by symbol, attending to the encoder outputs at every step.

    Luong, Pham and Manning (2015, arXiv 1508.04025), with h_t the RNN's output and c_t the context (eq. 7 and 8)::

        h~_t = tanh(Wc [h_t; c_t])                           (eq. 5; the RNN's output comes first in the concatenation)
        p(y_t | y_<t, x) = softmax(output(h~_t))             (eq. 6)

    B batch, T target steps, S source steps, L layers, H hidden size, Dm memory size, V vocabulary.

    Args:
        vocab_size: V, the number of target symbols.
        embedding_size: of a target symbol.
        hidden_size: H, of the RNN and of h~.
        method: the score: "dot", "general" or "concat".
        num_layers: L.
        cell: "gru" or "lstm".
        input_feeding: the RNN also reads the h~ of the step before (section 3.3). `hidden` is then a `DecoderState`,
            and teacher forcing goes step by step.
        memory_size: Dm, the size of the encoder outputs; None is `hidden_size`, and dot needs them equal.
        dropout: in training, the share of zeros in the embedded symbols, between RNN layers, and in h~ before the
            output layer. The h~ that input feeding carries on is whole.

    Attributes:
        embedding, rnn, attention, Wc, output: the layers, in the order a step runs through them.

    In every call, `hidden` is [L, B, H], of an LSTM the tuple (h, c), as an encoder ends with or as the call before
    returned it; None is zeros. With input feeding it is a `DecoderState`, or any of these to begin with h~ = 0. And
    `encoder_outputs` is [B, S, Dm], or what `decoder.attention.memory` made of it, which has its own lengths. Rows of
    it at and past `lengths` ([B] integers in [0, S]) may hold anything. For a mask, pass
    `decoder.attention.memory(encoder_outputs, lengths, mask)`.

    Raises:
        ValueError: a size, method, cell or dropout that does not fit; in a call, a shape, device or token out of range.
        TypeError: in a call, no tensor, or not of the dtype needed.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        method: str = "dot",
        num_layers: int = 1,
        cell: str = "gru",
        input_feeding: bool = False,
        memory_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        caller = "AttentionDecoder"
        vocab_size, embedding_size, hidden_size, num_layers, memory_size = checks.positive(
            caller,
            vocab_size=vocab_size,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            memory_size=hidden_size if memory_size is None else memory_size,
        )
        checks.flag(caller, "input_feeding", input_feeding)
        checks.choice(caller, "cell", cell, tuple(_CELLS))
        dropout = checks.fraction(caller, "dropout", dropout)
        self.cell = cell
        self.input_feeding = input_feeding
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.rnn = _CELLS[cell](
            embedding_size + hidden_size if input_feeding else embedding_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,  # nn.GRU warns about dropout between the layers of one
        )
        self.attention = LuongAttention(method, hidden_size, memory_size)
        self.Wc = nn.Linear(hidden_size + self.attention.memory_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def forward_step(
        self,
        decoder_input: Tensor,
        decoder_hidden: HiddenState | None,
        encoder_outputs: Tensor | AttentionMemory,
        lengths: Tensor | Collection[int] | None = None,
    ) -> tuple[Tensor, HiddenState, Tensor]:
        """One step. For a loop of them, make the memory once: `decoder.attention.memory(encoder_outputs, lengths)`.

        Args:
            decoder_input: [B, 1] int64 (or int32), the symbol before the one to predict.
            decoder_hidden, encoder_outputs, lengths: as the class says.

        Returns:
            log_probs [B, V] of the next symbol; hidden, for the next call; weights [B, 1, S].
        """
        arguments = self._arguments()
        arguments.bind("T", 1, "one decoder step")
        self._check_tokens(arguments, "decoder_input", decoder_input)
        lengths = self._check_memory(arguments, encoder_outputs, lengths)
        state = self._check_hidden(arguments, "decoder_hidden", decoder_hidden)
        log_probs, hidden, weights = self._advance(decoder_input, state, encoder_outputs, lengths)
        return log_probs.squeeze(1), hidden, weights

    def forward(
        self,
        targets: Tensor,
        hidden: HiddenState | None,
        encoder_outputs: Tensor | AttentionMemory,
        lengths: Tensor | Collection[int] | None = None,
        teacher_forcing_ratio: float = 1.0,
    ) -> tuple[Tensor, HiddenState, Tensor]:
        """All T steps: in one RNN call and one attention call where no step waits for another's prediction or h~.

        Args:
            targets: [B, T] int64 (or int32), the decoder's inputs: the start symbol, then the symbols of the target. A
                loss compares what is one step ahead of them: of sentences [B, T + 1] that begin with the start symbol,
                pass sentences[:, :-1], and compare log_probs with sentences[:, 1:].
            hidden, encoder_outputs, lengths: as the class says.
            teacher_forcing_ratio: the probability, drawn for every sentence and step after the first, that the decoder
                reads targets[:, t] and not its own last prediction. At 0, nothing after targets[:, 0] is read.

        Returns:
            log_probs [B, T, V], where log_probs[:, t] is of the symbol after targets[:, t]; hidden after the last step;
            weights [B, T, S].
        """
        teacher_forcing_ratio = checks.fraction("AttentionDecoder", "teacher_forcing_ratio", teacher_forcing_ratio)
        arguments = self._arguments()
        self._check_tokens(arguments, "targets", targets, steps_read=1 if teacher_forcing_ratio == 0 else None)
        lengths = self._check_memory(arguments, encoder_outputs, lengths)
        state = self._check_hidden(arguments, "hidden", hidden)
        if targets.shape[1] == 0 or (teacher_forcing_ratio == 1 and not self.input_feeding):
            return self._advance(targets, state, encoder_outputs, lengths)

        memory = self._memory(encoder_outputs, lengths)
        outputs = []
        predicted = targets[:, :1]  # so that the first draw is between the start symbol and itself
        for t, tokens in enumerate(targets.split(1, dim=1)):  # [B, 1]
            if teacher_forcing_ratio < 1:
                drawn = torch.rand(tokens.shape, dtype=torch.float32, device=tokens.device)
                is_forced = drawn < teacher_forcing_ratio
                tokens = torch.where(is_forced, tokens, predicted)
            log_probs, state, weights = self._advance(tokens, state, memory._of_step(t))
            predicted = log_probs.argmax(dim=-1)
            outputs.append((log_probs, weights))
        log_probs, weights = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
        return log_probs, state, weights

    @torch.no_grad()
    def generate(
        self,
        hidden: HiddenState | None,
        encoder_outputs: Tensor | AttentionMemory,
        lengths: Tensor | Collection[int] | None = None,
        *,
        start_symbol: int,
        end_symbol: int | None = None,
        max_length: int,
        beam_size: int = 1,
        length_penalty: float = 0.6,
    ) -> tuple[Tensor, Tensor]:
        """Greedy decoding, the most probable symbol at every step, or beam search. With dropout, `eval()` first.

        The beams of a sentence are queries of its one memory, which is never copied. Hypotheses that have ended compare
        by log P(Y) / ((5 + |Y|) / 6) ** length_penalty (Wu et al. 2016, arXiv 1609.08144, eq. 14).

        Args:
            hidden, encoder_outputs, lengths: as the class says.
            start_symbol: what the first step reads.
            end_symbol: ends a sentence; None: every sentence goes on to `max_length`.
            max_length: the most steps to take; fewer are taken where all sentences have ended.
            beam_size: the beginnings of each sentence that are followed; 1 is greedy.
            length_penalty: at least 0; 0 compares the probabilities themselves, which favours short sentences. One that
                would divide by more than 2^100 at `max_length` is refused.

        Returns:
            tokens [B, at most max_length] int64 without the start symbol, `end_symbol` from a sentence's first one on;
            weights [B, at most max_length, S], 0 after a sentence's end.
        """
        max_length, beam_size = checks.positive("AttentionDecoder", max_length=max_length, beam_size=beam_size)
        length_penalty = BeamSearch.checked_penalty("AttentionDecoder", max_length, length_penalty)
        start_symbol = self._check_symbol("start_symbol", start_symbol)
        end_symbol = None if end_symbol is None else self._check_symbol("end_symbol", end_symbol)
        arguments = self._arguments()
        lengths = self._check_memory(arguments, encoder_outputs, lengths)
        state = self._check_hidden(arguments, "hidden", hidden)
        memory = self._memory(encoder_outputs, lengths)
        if memory.mask is not None and memory.mask.dim() == 3:
            raise ValueError(
                f"AttentionDecoder: encoder_outputs has a mask of shape {list(memory.mask.shape)}, but how many steps "
                "there are is to be seen; needed is a mask [B, S]"
            )

        device, batch_size = self.embedding.weight.device, arguments.sizes["B"]
        search = BeamSearch(batch_size, beam_size, max_length, end_symbol, length_penalty, device)
        symbols = torch.full((batch_size, beam_size), start_symbol, device=device)
        if beam_size > 1:
            state = _rows(state, torch.arange(batch_size, device=device).repeat_interleave(beam_size))
        while not search.is_done():
            log_probs, state, weights = self._advance(symbols, state, memory, beams=beam_size)
            symbols, beams = search.advance(log_probs, weights)
            if beam_size > 1:
                state = _rows(state, beams)
        return search.best()

    def _advance(
        self,
        tokens: Tensor,
        state: HiddenState,
        encoder_outputs: Tensor | AttentionMemory,
        lengths: Tensor | Collection[int] | None = None,
        *,
        beams: int | None = None,
    ) -> tuple[Tensor, HiddenState, Tensor]:
        """The steps that read `tokens` [B, T], at once; T is at most 1 with input feeding.

        With `beams` K, tokens are [B, K]: one step of K hypotheses a sentence, whose state has B K rows.
        """
        inputs = self.dropout(self.embedding(tokens))  # [B, T, E]
        if beams is not None:
            inputs = inputs.flatten(0, 1).unsqueeze(1)  # [B K, 1, E]
        hidden, previous = state if self.input_feeding else (state, None)
        if previous is not None:
            fed = previous.unsqueeze(1).expand(-1, inputs.shape[1], -1)
            inputs = torch.cat([inputs, fed], dim=-1)  # [B, T, E + H]
        if tokens.numel():
            queries, hidden = self.rnn(inputs, hidden)  # [B, T, H]
        else:  # which nn.GRU refuses
            queries = inputs.new_zeros(*inputs.shape[:2], self.rnn.hidden_size)
        if beams is not None:
            queries = queries.view(*tokens.shape, self.rnn.hidden_size)  # [B, K, H]
        context, weights = self.attention(queries, encoder_outputs, lengths)  # [B, T, Dm], [B, T, S]
        attentional = torch.tanh(self.Wc(torch.cat([queries, context], dim=-1)))  # [B, T, H]
        # Under autocast the CPU would leave the logarithms in half precision.
        logits = self.output(self.dropout(attentional))
        log_probs = torch.log_softmax(logits, dim=-1, dtype=self.embedding.weight.dtype)  # [B, T, V]
        if previous is not None:
            if beams is not None:
                previous = attentional.flatten(0, 1)
            elif tokens.shape[1]:
                previous = attentional[:, -1]
            hidden = DecoderState(hidden, previous)
        return log_probs, hidden, weights

    def _memory(
        self, encoder_outputs: Tensor | AttentionMemory, lengths: Tensor | Collection[int] | None
    ) -> AttentionMemory:
        if isinstance(encoder_outputs, AttentionMemory):
            return encoder_outputs
        return self.attention.memory(encoder_outputs, lengths)

    def _arguments(self) -> checks.Arguments:
        """Checks against the decoder's parameters: their dtype and device, and the sizes they fix."""
        arguments = checks.Arguments("AttentionDecoder")
        arguments.leader = ("the decoder", self.embedding.weight)
        for size, name in {"L": "num_layers", "H": "hidden_size"}.items():
            arguments.bind(size, getattr(self.rnn, name), name)
        arguments.bind("Dm", self.attention.memory_size, "memory_size")
        return arguments

    def _check_tokens(
        self, arguments: checks.Arguments, name: str, tokens: Tensor, steps_read: int | None = None
    ) -> None:
        arguments.tensor(name, tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{arguments.caller}: {name} must be int64 or int32, got {tokens.dtype}")
        arguments.device(name, tokens)
        arguments.shape(name, tokens, "B T")
        read = tokens[:, :steps_read]
        # On other devices this would wait for them; there the embedding itself asserts it.
        if read.device.type == "cpu" and read.numel() and not torch.compiler.is_compiling() and type(read) is Tensor:
            for token in torch.aminmax(read):
                self._check_symbol(name, int(token))

    def _check_symbol(self, name: str, symbol: int) -> int:
        symbol = checks.integer("AttentionDecoder", name, symbol)
        if not 0 <= symbol < self.embedding.num_embeddings:
            needed = f"0 <= symbol < vocab_size={self.embedding.num_embeddings}"
            raise ValueError(f"AttentionDecoder: {name} has the symbol {symbol}, needed is {needed}")
        return symbol

    def _check_memory(
        self,
        arguments: checks.Arguments,
        encoder_outputs: Tensor | AttentionMemory,
        lengths: Tensor | Collection[int] | None,
    ) -> Tensor | None:
        """The lengths, as a tensor."""
        if isinstance(encoder_outputs, AttentionMemory):
            self.attention._check_memory(arguments.caller, encoder_outputs, lengths=lengths)
            encoder_outputs._check(arguments, "encoder_outputs", "B S Dm")
            arguments.mask(encoder_outputs.mask)
        else:
            arguments.floating("encoder_outputs", encoder_outputs, "B S Dm")
        return arguments.lengths(lengths)

    def _check_hidden(self, arguments: checks.Arguments, name: str, state: HiddenState | None) -> HiddenState:
        """`state` in the form that a step returns it."""
        weight, batch_size = self.embedding.weight, arguments.sizes["B"]
        is_lstm = self.cell == "lstm"  # a quantized one is no nn.LSTM
        hidden, attentional = state if self.input_feeding and isinstance(state, DecoderState) else (state, None)
        if hidden is None:
            zeros = weight.new_zeros(self.rnn.num_layers, batch_size, self.rnn.hidden_size)
            hidden = (zeros, zeros) if is_lstm else zeros
        name_of_hidden = name if attentional is None else f"{name}.hidden"
        came = f"{type(hidden).__name__} of {len(hidden)}" if isinstance(hidden, tuple) else type(hidden).__name__
        if is_lstm and not (isinstance(hidden, tuple) and len(hidden) == 2):
            raise TypeError(f"{arguments.caller}: {name_of_hidden} must be the tuple (h, c) of an LSTM, got {came}")
        if self.input_feeding and not is_lstm and isinstance(hidden, tuple):
            needed = "a torch.Tensor, or with input feeding a DecoderState"
            raise TypeError(f"{arguments.caller}: {name_of_hidden} must be {needed}, got {came}")
        parts = {f"{name_of_hidden}[{i}]": h for i, h in enumerate(hidden)} if is_lstm else {name_of_hidden: hidden}
        for part_name, part in parts.items():
            arguments.floating(part_name, part, "L B H")
        # cuDNN refuses any other layout.
        contiguous = tuple(part.contiguous() for part in parts.values())
        hidden = contiguous if is_lstm else contiguous[0]
        if not self.input_feeding:
            return hidden
        if attentional is None:
            attentional = weight.new_zeros(batch_size, self.rnn.hidden_size)
        arguments.floating(f"{name}.attentional", attentional, "B H")
        return DecoderState(hidden, attentional)

    def extra_repr(self) -> str:
        return f"input_feeding={self.input_feeding}"
