"""Translates dates as people write them, in eight languages, to ISO 8601: "lundi 7 mai 1984" -> "1984-05-07".

A bidirectional GRU reads the characters and `attn_ext.AttentionDecoder` writes the digits. The sentences are Babel's,
in every style of a language that spells the year out, and split by day: no day of the test is seen in training, in any
language.

    python examples/translate_dates.py                         # trains, tests, draws out/translate_dates.png
    python examples/translate_dates.py --resume                # goes on after Ctrl-C, to the same result
    torchrun --nproc-per-node 2 examples/translate_dates.py    # data-parallel, the same result
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import shlex
import signal
import statistics
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from babel import Locale
from babel.dates import format_date, tokenize_pattern
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import attn_ext

# data -----------------------------------------------------------------------------------------------------------------

LOCALES = ("en", "zh", "fr", "de", "es", "ru", "ja", "ar")
FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2100, 12, 31)

PADDING = "<pad>"  # source symbol 0
TARGET_SYMBOLS = (*"0123456789-", "<start>", "<end>")
START, END = 11, 12
TARGET_LENGTH = len("1984-05-07") + 1  # with END


class Sentence(NamedTuple):
    locale: str
    text: str
    day: date


class Corpus(NamedTuple):
    """N sentences as the model reads them, S symbols long at most."""

    sources: Tensor  # [N, S] int64: the locale, the characters, padding
    lengths: Tensor  # [N] int64, always on the CPU, where pack_padded_sequence wants them
    targets: Tensor  # [N, 1 + T] int64: START, the characters of the ISO date, END

    def rows(self, indices: Tensor, device: torch.device) -> Corpus:
        """Some of the sentences, with no more padding than they need."""
        lengths = self.lengths[indices]
        sources = self.sources[indices, : int(lengths.max())]
        return Corpus(sources.to(device), lengths, self.targets[indices].to(device))


def styles(locale: Locale) -> list[str]:
    """The locale's CLDR patterns that give the day, the month and the year in full, each once."""
    formats = (*locale.date_formats.values(), *locale.datetime_skeletons.values())
    return sorted({style.pattern for style in formats if spells_the_date_out(style.pattern)})


def spells_the_date_out(pattern: str) -> bool:
    """Whether a CLDR pattern names one day as people do: not by a year "yy" of two digits, nor a day "ddd" of three."""
    widths = dict(token for kind, token in tokenize_pattern(pattern) if kind == "field")
    has_month = "M" in widths or "L" in widths
    knows_only_days = widths.keys() <= set("GyMLdEec")  # era, year, month, day, weekday
    return widths.get("y") in (1, 4) and has_month and widths.get("d") in (1, 2) and knows_only_days


def draw_days(training: int, test: int, rng: random.Random) -> tuple[list[date], list[date]]:
    """Days to train on and days to test on, none in both."""
    ordinals = rng.sample(range(FIRST_DAY.toordinal(), LAST_DAY.toordinal() + 1), training + test)
    days = [date.fromordinal(ordinal) for ordinal in ordinals]
    return days[:training], days[training:]


def write_sentences(days: Iterable[date], rng: random.Random) -> list[Sentence]:
    """Every day in every language, in a style drawn at random."""
    languages = [(name, Locale.parse(name)) for name in LOCALES]
    patterns = {name: styles(locale) for name, locale in languages}
    return [
        Sentence(name, format_date(day, rng.choice(patterns[name]), locale), day)
        for day in days
        for name, locale in languages
    ]


def source_symbols(sentences: Iterable[Sentence]) -> list[str]:
    return [PADDING, *LOCALES, *sorted({character for sentence in sentences for character in sentence.text})]


def encode(sentences: Sequence[Sentence], symbols: Sequence[str]) -> Corpus:
    index = {symbol: i for i, symbol in enumerate(symbols)}
    lengths = torch.tensor([1 + len(sentence.text) for sentence in sentences])
    sources = torch.zeros(len(sentences), int(lengths.max()), dtype=torch.int64)
    is_symbol = torch.arange(sources.shape[1]) < lengths.unsqueeze(1)
    sources[is_symbol] = torch.tensor([index[symbol] for name, text, _ in sentences for symbol in (name, *text)])
    targets = [[START, *map(TARGET_SYMBOLS.index, sentence.day.isoformat()), END] for sentence in sentences]
    return Corpus(sources, lengths, torch.tensor(targets))


# model ----------------------------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """B sentences of S source symbols and T target symbols of V different ones; hidden size H."""

    def __init__(self, source_size: int, method: str, embedding_size: int = 32, hidden_size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(source_size, embedding_size)
        self.encoder = nn.GRU(embedding_size, hidden_size // 2, bidirectional=True, batch_first=True)
        self.decoder = attn_ext.AttentionDecoder(len(TARGET_SYMBOLS), embedding_size, hidden_size, method)

    def forward(self, sources: Tensor, lengths: Tensor, inputs: Tensor) -> Tensor:
        """sources [B, S], lengths [B], inputs [B, T] beginning with START -> log-probabilities [B, T, V]."""
        log_probs, _, _ = self.decoder(inputs, *self.encode(sources, lengths), lengths)
        return log_probs

    @torch.no_grad()
    def translate(self, sources: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """sources [B, S], lengths [B] -> symbols [B, T], with END and after it nothing else; weights [B, T, S]."""
        return self.decoder.generate(
            *self.encode(sources, lengths), lengths, start_symbol=START, end_symbol=END, max_length=TARGET_LENGTH
        )

    def encode(self, sources: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's first hidden state [1, B, H] and the memory [B, S, H], of both directions."""
        packed = pack_padded_sequence(self.embedding(sources), lengths, batch_first=True, enforce_sorted=False)
        outputs, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(outputs, batch_first=True)
        return torch.cat([last[0], last[1]], dim=-1).unsqueeze(0), memory


# training -------------------------------------------------------------------------------------------------------------

PEAK_LEARNING_RATE, WARM_UP = 4e-3, 0.2
CHECKPOINT_EVERY = 100  # steps
POOL = 8  # batches that are sorted by length together: an RNN's time is its longest sentence's


class Processes(NamedTuple):
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device


@dataclass
class Training:
    """All that changes from step to step and the settings it goes with, which is what a checkpoint holds.

    Nothing else decides the next step: its batch and its learning rate are functions of the settings and its number.
    """

    settings: dict[str, Any]
    model: Translator
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, unfinished)
        unfinished.replace(path)  # at no moment is there half a checkpoint at `path`

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in state["settings"].items():
            if value != self.settings[name]:
                raise SystemExit(f"{path} goes with another {name}: {value!r:.60}, not {self.settings[name]!r:.60}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Inside the block Ctrl-C is only noted in the list, so that no step and no checkpoint is cut in half."""
    came: list[int] = []
    previous_handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up under a cosine that ends at 0."""
    progress = (step + 1) / (steps + 1)
    return PEAK_LEARNING_RATE * min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2


def draw_batch(lengths: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """The sentences of a step, of similar lengths."""
    pool, place = divmod(step, POOL)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + pool)
    drawn = torch.randint(len(lengths), (POOL * batch_size,), generator=generator)
    batches = drawn[lengths[drawn].argsort(stable=True)].split(batch_size)
    return batches[torch.randperm(POOL, generator=generator)[place]]


def train_on(batch: Corpus, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """One training step; the loss."""
    log_probs = model(batch.sources, batch.lengths, batch.targets[:, :-1])
    loss = F.nll_loss(log_probs.flatten(0, 1), batch.targets[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def train(training: Training, corpus: Corpus, checkpoint: Path, processes: Processes) -> bool:
    """Takes the steps that are left; False where Ctrl-C came first. The checkpoint is there either way."""
    rank, count, device = processes
    steps, batch_size, seed = (training.settings[name] for name in ("steps", "batch_size", "seed"))
    model = DistributedDataParallel(training.model) if count > 1 else training.model
    progress_bar = tqdm(
        total=steps,
        initial=training.step,
        unit="step",
        mininterval=0.5,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        disable=rank > 0,
    )
    with noting_interrupts() as interrupts, progress_bar:
        while training.step < steps:
            # All processes draw the same batch, and each trains on its share of it.
            indices = draw_batch(corpus.lengths, batch_size, seed, training.step)
            batch = corpus.rows(indices[rank::count], device)
            for group in training.optimizer.param_groups:
                group["lr"] = learning_rate(training.step, steps)
            loss = train_on(batch, model, training.optimizer)
            training.step += 1
            # They also stop after the same step, whichever of them Ctrl-C reached first.
            shared = torch.stack([loss / count, loss.new_tensor(len(interrupts))])
            if count > 1:
                dist.all_reduce(shared)
            mean_loss, interrupted = shared.tolist()
            progress_bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            progress_bar.update()
            is_due = interrupted or training.step == steps or training.step % CHECKPOINT_EVERY == 0
            if is_due and rank == 0:
                training.save(checkpoint)
            if interrupted:
                return False
    return True


# evaluation -----------------------------------------------------------------------------------------------------------


def translate_all(model: Translator, corpus: Corpus, device: torch.device) -> Tensor:
    """The translations [N, T] of all sentences, END where they are shorter."""
    model.eval()
    translations = torch.full((len(corpus.lengths), TARGET_LENGTH), END)
    for indices in corpus.lengths.argsort().split(500):  # sentences of like lengths together: less padding
        batch = corpus.rows(indices, device)
        symbols, _ = model.translate(batch.sources, batch.lengths)
        translations[indices, : symbols.shape[1]] = symbols.cpu()
    return translations


def spell(symbols: Sequence[int]) -> str:
    """The text before END."""
    symbols = [*symbols, END]
    return "".join(TARGET_SYMBOLS[symbol] for symbol in symbols[: symbols.index(END)])


def report_accuracy(model: Translator, corpus: Corpus, sentences: Sequence[Sentence], device: torch.device) -> None:
    translations = translate_all(model, corpus, device)
    is_exact = (translations == corpus.targets[:, 1:]).all(dim=1)
    days = len({sentence.day for sentence in sentences})
    accuracy = is_exact.double().mean().item()
    print(f"\nExact match: {accuracy:.2%} of {len(sentences)} sentences, of {days} days never seen in training")
    for name in LOCALES:
        of_locale = [i for i, sentence in enumerate(sentences) if sentence.locale == name]
        example = of_locale[0]
        translation = spell(translations[example].tolist())
        print(f"  {name} {is_exact[of_locale].double().mean():8.2%}   {translation} <- {sentences[example].text}")


def report_step_times(training: Training, corpus: Corpus, device: torch.device, rounds: int = 10) -> None:
    """Times a training step with both backends in turn, so that a busy machine is equally unkind to them."""
    model = copy.deepcopy(training.model).train()
    optimizer = torch.optim.Adam(model.parameters())
    batch_size = training.settings["batch_size"]
    seconds: dict[str, list[float]] = {"fused": [], "reference": []}
    if problem := why_not_fused(device):
        del seconds["fused"]
    for i in range(rounds):
        batch = corpus.rows(draw_batch(corpus.lengths, batch_size, 0, i), device)
        for backend, times in seconds.items():
            with attn_ext.use_backend(backend):
                begin = time.perf_counter()
                train_on(batch, model, optimizer).item()
                times.append(time.perf_counter() - begin)
    medians = {backend: statistics.median(times[rounds // 5 :]) * 1e3 for backend, times in seconds.items()}
    listed = ", ".join(f"{backend} {median:.1f} ms" for backend, median in medians.items())
    verdict = problem or f"{medians['reference'] / medians['fused']:.2f} times as fast"
    print(f"\nTraining step of {batch_size} sentences, {training.model.decoder.attention.method}: {listed} ({verdict})")


def why_not_fused(device: torch.device) -> str | None:
    row = torch.zeros(1, 1, 1, device=device)
    try:
        with attn_ext.use_backend("fused"):
            attn_ext.dot_attention(row, row)
    except RuntimeError as error:
        return str(error)
    return None


# picture --------------------------------------------------------------------------------------------------------------

PICTURE_LOCALES = ("en", "es", "ru")  # matplotlib's own font has all their letters, and they read from left to right


def draw_alignments(
    model: Translator, corpus: Corpus, sentences: Sequence[Sentence], path: Path, device: torch.device
) -> None:
    """What the decoder attends to as it writes each character, for the longest sentence of each of three languages."""
    model.eval()
    figure = Figure(figsize=(12, 12.5), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    all_axes = figure.subplots(len(PICTURE_LOCALES))
    for name, axes in zip(PICTURE_LOCALES, all_axes, strict=True):
        of_locale = [i for i, sentence in enumerate(sentences) if sentence.locale == name]
        row = max(of_locale, key=corpus.lengths.__getitem__)
        batch = corpus.rows(torch.tensor([row]), device)
        symbols, weights = model.translate(batch.sources, batch.lengths)
        target = spell(symbols[0].tolist())
        source = [name, *map(visible, sentences[row].text)]
        image = axes.imshow(weights[0, : len(target)].cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"{sentences[row].text}  \N{RIGHTWARDS ARROW}  {target}", loc="left", fontsize=13, pad=10)
        axes.set_xticks(range(len(source)), source, fontsize=12)
        axes.set_yticks(range(len(target)), list(target), fontsize=12)
        axes.tick_params(length=0)
    figure.colorbar(image, ax=all_axes, label="attention weight", shrink=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def visible(character: str) -> str:
    """A character as a tick label: a space of any kind would be no label at all."""
    return "\N{OPEN BOX}" if unicodedata.category(character) == "Zs" else character


# command line ---------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count = {"type": positive, "metavar": "N"}
    parser.add_argument("--method", choices=("dot", "general", "concat"), default="concat", help="of attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", **count, default=1, help="of each process; these small operations need no more")
    parser.add_argument("--steps", **count, default=500, help="of training in all")
    parser.add_argument("--batch-size", **count, default=128, help="of all processes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-days", **count, default=8000)
    parser.add_argument("--test-days", **count, default=1000)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/translate_dates.pt"), metavar="PATH")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint; otherwise it is replaced")
    parser.add_argument("--plot", type=Path, default=Path("out/translate_dates.png"), metavar="PATH")
    options = parser.parse_args(arguments)
    try:
        torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    there_are = (LAST_DAY - FIRST_DAY).days + 1
    if options.training_days + options.test_days > there_are:
        parser.error(f"--training-days and --test-days: {there_are} days are to be had in all")
    if options.resume and not options.checkpoint.is_file():
        parser.error(f"--resume: there is no checkpoint {options.checkpoint}")
    if options.batch_size % (processes := int(os.environ.get("WORLD_SIZE", 1))):
        parser.error(f"--batch-size: {options.batch_size} sentences cannot be shared equally by {processes} processes")
    return options


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


@contextmanager
def join_processes(device_name: str) -> Iterator[Processes]:
    """Under torchrun, this process's place among the others; otherwise it is the only one."""
    device = torch.device(device_name)
    if "LOCAL_RANK" not in os.environ:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # torchrun ends them all should one fail, so none leaves before rank 0 has tested and drawn
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, processes: Processes) -> int:
    rank, count, device = processes
    rng = random.Random(options.seed)
    training_days, test_days = draw_days(options.training_days, options.test_days, rng)
    training_sentences, test_sentences = write_sentences(training_days, rng), write_sentences(test_days, rng)
    symbols = source_symbols([*training_sentences, *test_sentences])
    corpus, test_corpus = encode(training_sentences, symbols), encode(test_sentences, symbols)

    torch.manual_seed(options.seed)
    model = Translator(len(symbols), options.method).to(device)
    names = ("method", "steps", "batch_size", "seed", "training_days", "test_days")
    training = Training(
        settings={**{name: getattr(options, name) for name in names}, "symbols": symbols},
        model=model,
        optimizer=torch.optim.Adam(model.parameters()),
    )
    if options.resume:
        training.load(options.checkpoint)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{options.method} attention, {parameters} parameters, on {count} x {device.type}; ", end="")
        print(f"{len(training_sentences)} sentences of {len(symbols)} symbols")
    is_finished = train(training, corpus, options.checkpoint, processes)
    if rank == 0 and is_finished:
        report_accuracy(model, test_corpus, test_sentences, device)
        report_step_times(training, corpus, device)
        draw_alignments(model, test_corpus, test_sentences, options.plot, device)
        print(f"\nAlignments: {options.plot}\nCheckpoint: {options.checkpoint}")
    elif rank == 0:
        launcher = ["python"] if count == 1 else ["torchrun", "--nproc-per-node", str(count)]
        resume = shlex.join([*launcher, *(argument for argument in sys.argv if argument != "--resume"), "--resume"])
        print(f"\nInterrupted after step {training.step}. Checkpoint: {options.checkpoint}\nTo go on: {resume}")
    return 0 if is_finished else 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    with join_processes(options.device) as processes:
        return run(options, processes)


if __name__ == "__main__":
    sys.exit(main())
