"""Beam search: which symbols a batch's hypotheses go on with, and which of them were the best."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_ext import checks


class BeamSearch:
    """The `beam_size` most probable beginnings of each sentence, step by step; with one beam, the greedy choice.

    A hypothesis Y is worth, at its end, log P(Y) / lp(Y) with lp(Y) = ((5 + |Y|) / 6) ** length_penalty (Wu et al.
    2016, arXiv 1609.08144, eq. 14). A sentence is done when `beam_size` of its hypotheses have ended, or when no
    beginning can become better than the best of those.

    B batch, K beams, V symbols, S source steps. The steps' results are kept until the end, and nothing is copied
    meanwhile: a beam is known by where it came from.

    Args:
        batch_size, beam_size, max_length: B, K, and the most steps that will be taken.
        end_symbol: ends a hypothesis; None: none ends.
        length_penalty: the exponent, at least 0.
        device: of the steps' tensors.
    """

    def __init__(
        self,
        batch_size: int,
        beam_size: int,
        max_length: int,
        end_symbol: int | None,
        length_penalty: float,
        device: torch.device,
    ) -> None:
        self.beam_size = beam_size
        self._max_length = max_length
        self._end_symbol = end_symbol
        self._length_penalty = length_penalty
        # All beams begin alike: one of them will do. Of halves, the sums are not halves.
        self._scores = torch.full((batch_size, beam_size), float("-inf"), dtype=torch.float32, device=device)
        self._scores[:, 0] = 0.0
        # Of each step, the beams' origins and symbols [B, K] and their weights [B, K, S].
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        # The best ended hypothesis of each sentence: what it is worth, the step of its end, the beam it was until then.
        self._best = self._scores.new_full((batch_size,), float("-inf"))
        self._end = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._origin = torch.zeros_like(self._end)
        self._ended = torch.zeros_like(self._end)  # so many have

    @staticmethod
    def checked_penalty(caller: str, max_length: int, length_penalty: float) -> float:
        """The penalty as a float: a number that leaves the worths of hypotheses apart, or ValueError or TypeError."""
        penalty = checks.not_negative(caller, "length_penalty", length_penalty)
        most = 100 / _log2_of_base(max(max_length, 2))  # a divisor of 2^100; float32 ends at 2^127
        if penalty > most:
            raise ValueError(
                f"{caller}: length_penalty is {length_penalty}, "
                f"needed is at most {most:.4g} with max_length={max_length}"
            )
        return penalty

    def advance(self, log_probs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of every beam's next symbol [B, K, V] and its weights [B, K, S]: the symbols to go on with, and from where.

        Returns:
            symbols [B, K] int64; beams [B K] int64, the rows of a state of B K rows that they continue.
        """
        batch_size, beams, symbols_count = log_probs.shape
        length = len(self._steps) + 1
        scores = (self._scores.unsqueeze(-1) + log_probs).flatten(1)  # [B, K V]
        # As many could end as are to go on.
        scores, choice = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
        origins, symbols = choice.div(symbols_count, rounding_mode="floor"), choice % symbols_count
        if self._end_symbol is not None:
            ends = symbols == self._end_symbol
            self._end_hypotheses(scores[:, :beams].masked_fill(~ends[:, :beams], float("-inf")), origins, length)
            scores = scores.masked_fill(ends, float("-inf"))
        scores, kept = scores.topk(beams, dim=1)
        origins, symbols = origins.gather(1, kept), symbols.gather(1, kept)
        self._scores = scores
        self._steps.append((origins, symbols, weights))
        first_rows = torch.arange(batch_size, device=symbols.device).unsqueeze(1) * beams
        return symbols, (first_rows + origins).flatten()

    def is_done(self) -> bool:
        """Whether there is nothing left to find; looks at the device's results."""
        if len(self._steps) == self._max_length:
            return True
        if self._end_symbol is None or not self._steps:
            return False
        # What is to come can only lower a score, and lp is largest at the greatest length.
        hopeless = self._best >= self._scores[:, 0] / self._penalty(self._max_length)
        return bool(((self._ended >= self.beam_size) | hopeless).all())

    def best(self) -> tuple[Tensor, Tensor]:
        """The best ended hypothesis of each sentence; where none has ended, the most probable beginning.

        Returns:
            symbols [B, n] int64, up to the last end of all sentences, filled up with the end symbol; weights [B, n, S],
            filled up with zeros.
        """
        last = len(self._steps) - 1
        has_ended = self._ended > 0
        ends = torch.where(has_ended, self._end, last)
        length = int(ends.max()) + 1 if len(ends) else 1
        beam = torch.zeros_like(ends)  # after the step
        all_symbols, all_weights = [], []
        for step in range(length - 1, -1, -1):
            origins, symbols, weights = self._steps[step]
            at_end, after_end = has_ended & (step == ends), step > ends
            symbol = symbols.gather(1, beam.unsqueeze(1)).squeeze(1)
            if self._end_symbol is not None:
                symbol = symbol.masked_fill(at_end | after_end, self._end_symbol)
            beam = torch.where(at_end, self._origin, origins.gather(1, beam.unsqueeze(1)).squeeze(1))
            beam = beam.masked_fill(after_end, 0)
            row = weights.take_along_dim(beam.view(-1, 1, 1), dim=1).squeeze(1)
            all_symbols.append(symbol)
            all_weights.append(row.masked_fill(after_end.unsqueeze(1), 0.0))
        return torch.stack(all_symbols[::-1], dim=1), torch.stack(all_weights[::-1], dim=1)

    def _end_hypotheses(self, scores: Tensor, origins: Tensor, length: int) -> None:
        """Hypotheses of `length` end with `scores` [B, K], -inf for none; a sentence that is done takes no more."""
        scores = scores.masked_fill((self._ended >= self.beam_size).unsqueeze(1), float("-inf"))
        worth, which = (scores / self._penalty(length)).max(dim=1)
        is_better = worth > self._best
        self._best = torch.where(is_better, worth, self._best)
        self._end = torch.where(is_better, length - 1, self._end)
        self._origin = torch.where(is_better, origins.gather(1, which.unsqueeze(1)).squeeze(1), self._origin)
        self._ended = self._ended + scores.isfinite().sum(dim=1)

    def _penalty(self, length: int) -> float:
        return 2.0 ** (self._length_penalty * _log2_of_base(length))


def _log2_of_base(length: int) -> float:
    """Of (5 + length) / 6, which of the largest integers is no float."""
    return math.log2(5 + length) - math.log2(6)
