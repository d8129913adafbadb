"""examples/translate_dates.py: its data, its command line, and that stopping or sharing training changes nothing."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import unicodedata
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

for requirement in ("babel", "matplotlib", "tqdm"):
    pytest.importorskip(requirement, reason=f"examples/translate_dates.py needs {requirement}")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "translate_dates.py"
TINY = ["--training-days", "20", "--test-days", "5", "--batch-size", "8", "--device", "cpu"]


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("translate_dates", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


example = load_example()


def paths(folder: Path) -> list[str]:
    return ["--checkpoint", str(folder / "dates.pt"), "--plot", str(folder / "dates.png")]


def run(folder: Path, *arguments: str) -> int:
    return example.main([*TINY, *paths(folder), *arguments])


@pytest.fixture
def only_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the training is left out, for its time."""
    for name in ("report_accuracy", "report_step_times", "draw_alignments"):
        monkeypatch.setattr(example, name, lambda *_: None)


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "dates.pt", weights_only=True)


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint(folder)["model"]


# data


def test_no_day_is_in_training_and_test() -> None:
    training, test = example.draw_days(8000, 1000, random.Random(0))
    assert (len(set(training)), len(set(test))) == (8000, 1000)
    assert set(training).isdisjoint(test)
    assert min(training) >= date(1900, 1, 1)
    assert max(training) <= date(2100, 12, 31)
    assert {day.year for day in training} == set(range(1900, 2101))
    sentences = example.write_sentences(test, random.Random(0))
    assert {sentence.day for sentence in sentences} == set(test)


@pytest.mark.parametrize("name", example.LOCALES)
def test_styles_spell_the_year_out(name: str) -> None:
    locale = example.Locale.parse(name)
    chosen = example.styles(locale)
    for pattern in chosen:
        text = example.format_date(date(1984, 5, 7), pattern, locale)
        assert "1984" in "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text), pattern
    named = {style.pattern for style in locale.date_formats.values()}
    assert named & set(chosen)
    for pattern in named - set(chosen):
        assert "1984" not in example.format_date(date(1984, 5, 7), pattern, locale), pattern


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("EEEE, d 'de' MMMM 'de' y", True),
        ("yyyy-MM-dd", True),
        ("dd.LL.y", True),
        ("d.M.yy", False),
        ("E, MMM ddd, y", False),
        ("MMMM y", False),
        ("d. MMMM", False),
        ("y年M月d日 HH:mm", False),
        ("'y' d M", False),
    ],
)
def test_spells_the_date_out(pattern: str, expected: bool) -> None:
    assert example.spells_the_date_out(pattern) == expected


def test_sentences_and_tensors_say_the_same() -> None:
    days, _ = example.draw_days(200, 1, random.Random(1))
    sentences = example.write_sentences(days, random.Random(1))
    symbols = example.source_symbols(sentences)
    corpus = example.encode(sentences, symbols)
    assert len(sentences) == 200 * len(example.LOCALES)
    for sentence, source, length, target in zip(sentences, *corpus, strict=True):
        assert [symbols[i] for i in source[:length]] == [sentence.locale, *sentence.text]
        assert source[length:].count_nonzero() == 0
        assert target[0] == example.START
        assert target[-1] == example.END
        assert example.spell(target[1:].tolist()) == sentence.day.isoformat()
    meanings: dict[tuple[str, str], date] = {}
    for name, text, day in sentences:
        assert meanings.setdefault((name, text), day) == day, text


def test_rows() -> None:
    corpus = example.Corpus(torch.arange(12).view(3, 4), torch.tensor([4, 1, 2]), torch.arange(3).view(3, 1))
    rows = corpus.rows(torch.tensor([2, 1]), torch.device("cpu"))
    assert [part.tolist() for part in rows] == [[[8, 9], [4, 5]], [2, 1], [[2], [1]]]


def test_batches_follow_the_seed_and_the_step() -> None:
    lengths = torch.randint(10, 40, (500,))

    def draw(seed: int, step: int) -> Tensor:
        return example.draw_batch(lengths, 32, seed, step)

    assert torch.equal(draw(0, 3), draw(0, 3))
    assert not torch.equal(draw(0, 3), draw(1, 3))
    batches = [draw(0, step) for step in range(2 * example.POOL)]
    assert not any(torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
    spreads = [(lengths[batch].max() - lengths[batch].min()).item() for batch in batches]
    assert max(spreads) < lengths.max() - lengths.min()


# the command line


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--steps", "3", "--method", "concat") == 0
    output, progress = capsys.readouterr()
    assert "Exact match: " in output
    assert all(f"\n  {name} " in output for name in example.LOCALES)
    assert "reference" in output.split("Training step of 8 sentences, concat: ")[1]
    assert "loss=" in progress
    assert "step/s" in progress
    assert (tmp_path / "dates.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint(tmp_path)["step"] == 3
    assert list(tmp_path.glob("*.part")) == []


def test_resuming_changes_nothing(tmp_path: Path, only_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "--steps", "12") == 0
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        train_on, steps = example.train_on, []

        def interrupted_in_the_fifth(*arguments: Any) -> Tensor:
            steps.append(train_on(*arguments))
            if len(steps) == 5:
                signal.raise_signal(signal.SIGINT)
            return steps[-1]

        patch.setattr(example, "train_on", interrupted_in_the_fifth)
        assert run(parts, "--steps", "12") == 130
    assert checkpoint(parts)["step"] == len(steps) == 5
    assert signal.getsignal(signal.SIGINT) is handler
    assert run(parts, "--steps", "12", "--resume") == 0
    expected = weights(whole)
    for name, weight in weights(parts).items():
        assert torch.equal(weight, expected[name]), name
    with pytest.raises(SystemExit, match=r"dates.pt goes with another method: 'concat', not 'general'"):
        run(parts, "--steps", "12", "--method", "general", "--resume")


def test_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *TINY, *paths(tmp_path), "--steps", "100000"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    while "loss=" not in (text := process.stderr.read(60)):  # the training goes on
        assert text, process.stdout.read()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    steps = checkpoint(tmp_path)["step"]
    assert f"Interrupted after step {steps}. Checkpoint: {tmp_path / 'dates.pt'}" in output
    resume = output.split("To go on: ")[1].split()
    assert resume[0] == "python"
    assert resume[-1] == "--resume"


def test_two_processes_do_what_one_does(tmp_path: Path, only_training: None) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*torchrun, SCRIPT, *TINY, *paths(together), "--steps", "4"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Exact match") == 1
    assert (together / "dates.png").is_file()
    assert run(alone, "--steps", "4") == 0
    expected = weights(alone)
    for name, weight in weights(together).items():
        torch.testing.assert_close(
            weight, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--resume"], "--resume: there is no checkpoint"),
        (["--batch-size", "9"], "--batch-size: 9 sentences cannot be shared equally by 2 processes"),
        (["--steps", "0"], "argument --steps: 0 is not positive"),
        (["--steps", "many"], "argument --steps: invalid positive value: 'many'"),
        (["--method", "cos"], "argument --method: invalid choice: 'cos'"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
