"""Translates dates as people write them in eight languages to ISO 8601, character by character.

    mercoledì? no: en zh fr de es ru ja ar,    "lundi 7 mai 1984" -> "1984-05-07"
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from babel import Locale
from babel.dates import format_date, tokenize_pattern
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import attn_ext

LOCALES = ("en", "zh", "fr", "de", "es", "ru", "ja", "ar")
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2100, 12, 31)
TRAINING_DAYS, TEST_DAYS = 8000, 1000
STYLES_PER_DAY = 2

PAD = "<pad>"
DIGITS = "0123456789-"
START, END = len(DIGITS), len(DIGITS) + 1
TARGET_LENGTH = len("1984-05-07") + 1  # with END


# ---------------------------------------------------------------- data


def styles(locale: Locale) -> list[str]:
    patterns = {style.pattern for style in (*locale.date_formats.values(), *locale.datetime_skeletons.values())}
    return sorted(filter(spells_the_date_out, patterns))


def spells_the_date_out(pattern: str) -> bool:
    fields = dict(token for kind, token in tokenize_pattern(pattern) if kind == "field")
    has_month = "M" in fields or "L" in fields
    return fields.get("y") in (1, 4) and has_month and "d" in fields and fields.keys() <= set("GyMLdEec")


class Sentence(NamedTuple):
    locale: str
    text: str
    day: datetime.date


def write_days(days, styles_per_day, rng):
    sentences = []
    for name in LOCALES:
        locale = Locale.parse(name)
        patterns = styles(locale)
        for day in days:
            for pattern in rng.sample(patterns, min(styles_per_day, len(patterns))):
                sentences.append(Sentence(name, format_date(day, pattern, locale), day))
    return sentences


class Corpus(NamedTuple):
    sources: Tensor
    lengths: Tensor
    targets: Tensor


def encode(sentences, symbols):
    index = {s: i for i, s in enumerate(symbols)}
    longest = max(len(s.text) for s in sentences) + 1
    rows = []
    for s in sentences:
        row = [index[s.locale], *(index[c] for c in s.text)]
        rows.append(row + [0] * (longest - len(row)))
    return Corpus(torch.tensor(rows), torch.tensor([len(s.text) + 1 for s in sentences]),
        torch.tensor([[START, *map(DIGITS.index, s.day.isoformat()), END] for s in sentences]))


class Translator(nn.Module):
    def __init__(self, symbols, method, embedding_size=32, hidden_size=128):
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding_size)
        self.encoder = nn.GRU(embedding_size, hidden_size // 2, bidirectional=True, batch_first=True)
        self.decoder = attn_ext.AttentionDecoder(END + 1, embedding_size, hidden_size, method)

    def encode(self, sources, lengths):
        packed = pack_padded_sequence(self.embedding(sources), lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, last = self.encoder(packed)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        return outputs, torch.cat([last[0], last[1]], dim=-1).unsqueeze(0)

    def forward(self, sources, lengths, targets):
        outputs, hidden = self.encode(sources, lengths)
        return self.decoder(targets, hidden, outputs, lengths)[0]

    def translate(self, sources, lengths):
        outputs, hidden = self.encode(sources, lengths)
        return self.decoder.generate(hidden, outputs, lengths, start_symbol=START, end_symbol=END, max_length=TARGET_LENGTH)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--method", default="general")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--emb", type=int, default=32)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--warm", type=float, default=0.1)
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    t0 = time.time()
    rng = random.Random(o.seed)
    days = [FIRST_DAY + datetime.timedelta(n) for n in rng.sample(range((LAST_DAY - FIRST_DAY).days + 1), TRAINING_DAYS + TEST_DAYS)]
    train = write_days(days[TEST_DAYS:], STYLES_PER_DAY, rng)
    test = write_days(days[:TEST_DAYS], 1, rng)
    symbols = [PAD, *LOCALES, *sorted({c for s in train for c in s.text})]
    tr, te = encode(train, symbols), encode(test, symbols)
    print(len(train), len(symbols), tr.sources.shape, tr.lengths.float().mean(), time.time() - t0)
    torch.manual_seed(o.seed)
    model = Translator(len(symbols), o.method, o.emb, o.hidden)
    opt = torch.optim.Adam(model.parameters(), lr=o.lr)
    import math
    g = torch.Generator().manual_seed(o.seed)
    t0 = time.time()
    def ev():
        model.eval(); ok = []
        order = te.lengths.argsort()
        for b in order.split(500):
            L = te.lengths[b]
            tok, w = model.translate(te.sources[b][:, :L.max()], L)
            tok = F.pad(tok, (0, TARGET_LENGTH - tok.shape[1]), value=END)
            ok.append((tok == te.targets[b][:, 1:]).all(1))
        model.train()
        ok = torch.cat(ok); loc = te.sources[order, 0]
        return ok.float().mean().item(), [round(ok[loc == i].float().mean().item(), 3) for i in range(1, 9)]
    for step in range(o.steps):
        w = o.warm * o.steps
        opt.param_groups[0]["lr"] = o.lr * (min(1, (step + 1) / w) if step < w else 0.5 * (1 + math.cos(math.pi * (step - w) / (o.steps - w))))
        b = torch.randint(len(tr.lengths), (o.batch,), generator=g)
        L = tr.lengths[b]; T = tr.targets[b]
        lp = model(tr.sources[b][:, :L.max()], L, T[:, :-1])
        loss = F.nll_loss(lp.flatten(0, 1), T[:, 1:].flatten())
        opt.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (step + 1) % 250 == 0:
            t1 = time.time(); r = ev(); t2 = time.time()
            print(step + 1, f"{loss.item():.4f} {r[0]:.4f}", r[1], f"train {t1 - t0:.1f} eval {t2 - t1:.1f}", flush=True)
            t0 += t2 - t1

if __name__ == "__main__":
    main()
