"""What `make gpu-check` does that needs no GPU: floors, stages that cannot run, the report, bits that change."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_calls, gpu_check, gpu_speed, gpu_steps
from benchmarks.gpu_check import Stage
from benchmarks.gpu_speed import Ceilings, Row, Workload
from tests.cuda import on_device
from tests.processes import python

H200 = Ceilings(4.3e12, {"bfloat16": 790e12, "float32": 50e12}, 132 * 16 * 1.98e9, 132 * 128 * 1.98e9)


@pytest.mark.parametrize(
    ("method", "sizes", "direction", "microseconds", "bound"),
    [
        ("dot", (64, 1, 512, 1024), "forward", 15.7, "memory"),
        ("dot", (64, 1, 512, 1024), "backward", 31.3, "memory"),
        ("additive", (64, 1, 512, 1024), "forward", 31.3, "memory"),
        ("additive", (64, 1, 512, 1024), "backward", 62.6, "memory"),
        ("dot", (8, 1024, 1024, 1024), "forward", 43.5, "products"),
        ("dot", (8, 1024, 1024, 1024), "backward", 87, "products"),
        ("additive", (32, 128, 128, 512), "forward", 32, "special functions"),
        ("additive", (8, 1024, 1024, 1024), "forward", 1027, "special functions"),
        ("additive", (32, 128, 128, 512), "backward", 56, "instructions"),
        ("additive", (8, 1024, 1024, 1024), "backward", 1796, "instructions"),
    ],
)
def test_floors_are_those_that_were_counted_by_hand(
    method: str, sizes: tuple[int, int, int, int], direction: str, microseconds: float, bound: str
) -> None:
    floor = Workload(method, sizes, direction).floor(H200)
    assert max(floor, key=floor.__getitem__) == bound
    assert floor[bound] * 1e6 == pytest.approx(microseconds, rel=0.02)


def test_a_set_of_inputs_has_left_the_cache_when_its_turn_comes_again() -> None:
    for workload in gpu_speed.workloads():
        sets = gpu_speed.input_sets(workload, 50 << 20)
        assert 2 <= sets <= 64
        assert sets * workload.bytes > 60 << 20


def test_everybody_is_measured_or_it_is_said_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_of(workload: Workload, attend: object, cache_bytes: int) -> tuple[float, float, list[Tensor]]:
        if attend is gpu_speed.eager and workload.method == "additive":
            raise torch.OutOfMemoryError("tried to allocate\nmuch")
        if workload.direction == "backward" and attend is not gpu_speed.fused:
            return 2e-5, 4e-5, [torch.ones(3), torch.zeros(3)]  # the last gradient is another one
        return 1e-5, 3e-5, [torch.ones(3), torch.ones(3)]

    monkeypatch.setattr(gpu_speed, "seconds_of", seconds_of)
    found = [Workload(m, (4, 8, 16, 32), d) for m in ("dot", "additive") for d in ("forward", "backward")]
    rows = [Row(each, each.floor(H200)) for each in [*found, Workload("dot", gpu_speed.MAIN[0], "forward")]]
    saved: list[None] = []
    gpu_speed.measure(rows, 1 << 20, time.perf_counter() + gpu_speed.COMPILE_SECONDS / 2, lambda: saved.append(None))
    assert saved
    for row in rows:
        asked = {name for name, _, _ in gpu_speed.contestants(row.workload)}
        assert row.seconds.keys() | row.missing.keys() == asked
        assert row.seconds["fused"] == 1e-5
        assert row.to_json()["share"] == max(row.floor.values()) / 1e-5
    assert "result 1 differs from the fused op's" in rows[1].missing["eager"]
    assert rows[2].missing["eager"] == "OutOfMemoryError: tried to allocate"
    assert rows[4].missing["compiled"] == "the time was over"


def test_the_report_has_every_stage_and_number(tmp_path: Path) -> None:
    row = Row(Workload("dot", (64, 1, 512, 1024), "forward"), {"memory": 1.57e-5})
    row.seconds, row.called = {"fused": 2e-5, "eager": 6e-5}, {"fused": 3e-5}
    row.missing = {"compiled": "the time was over"}
    data = {"ceilings": vars(H200), "L2 bytes": 50 << 20, "rows": [row.to_json()]}
    stages = [Stage("build", "passed", 61, ["attn_ext: CUDA yes"]), Stage("speed", "passed", 100, data=data)]
    about = {"GPU": "NVIDIA H200, sm_90", "commit": "abc1234+"}
    assert json.loads(json.dumps([asdict(stage) for stage in stages]))[1]["data"]["rows"][0]["bound"] == "memory"
    text = gpu_check.markdown(about, stages)
    assert "| build | passed | 61 |" in text
    assert "attn_ext: CUDA yes" in text
    for cell in (
        "15.7, memory",
        "| 20.0 |",
        "78% (wanted 85%)",
        "| 30.0 |",
        "eager 60.0 (3.00x)",
        "compiled: the time",
    ):
        assert cell in text
    version = torch.__version__.split("+")[0]
    assert gpu_check.name_of_report(about) == f"nvidia-h200-torch-{version}-abc1234"


def test_training_steps_are_set_beside_those_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(who: str, method: str, *_: object) -> str:
        if (who, method) == ("eager", "concat"):
            raise torch.OutOfMemoryError("tried to allocate\nmuch")
        made.append(f"{who} {method}")
        return who

    monkeypatch.setattr(gpu_steps, "replayed", {"none": 2e-3, "fused": 2.2e-3, "eager": 3e-3}.__getitem__)
    rows = [gpu_steps.Steps((4, 3, 5, 16), "bfloat16"), gpu_steps.Steps((4, 3, 5, 16), "float32")]
    gpu_steps.measure(rows, time.perf_counter() + 60, lambda: None, make)
    assert made[:4] == ["none dot", "fused dot", "fused general", "fused concat"]
    text = "\n".join(gpu_check.TABLES["training steps"]([vars(row) for row in rows]))
    assert "| (4, 3, 5, 16) | float32 | 2.00 | 1.10x, 1.50x | 1.10x, 1.50x | 1.10x, - |" in text
    assert "eager concat: OutOfMemoryError: tried to allocate" in text
    gpu_steps.measure(rows, 0.0, lambda: None, make)
    assert rows[0].missing["none dot"] == "the time was over"


def test_a_command_ends_with_its_time_and_what_it_said_is_kept() -> None:
    program = "import time; print('begun', flush=True); time.sleep(60)"
    begin = time.monotonic()
    status, said = gpu_check.run([sys.executable, "-c", program], 2)
    assert time.monotonic() - begin < 30
    assert (status, said) == (None, "begun\n")
    assert gpu_check.verdict_of(status, 2) == "not run to its end in 2 s"
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], 20) == (3, "")


def test_a_missing_tool_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    assert gpu_check.sanitizers(10).verdict == "not run: there is no compute-sanitizer"


@pytest.mark.parametrize("missing", [None, "expecttest", "pytest"])
def test_what_tests_need_is_looked_for(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], limit: float, log: str, **_: str) -> tuple[int, str]:
        commands.append(command)
        return 1, "...\nFAILED tests/test_ops.py::test_x\n1 failed, 2 passed in 3.4s\n"

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == missing else object())
    stage = gpu_check.tests(10)
    if missing == "pytest":
        assert stage.verdict == "not run: pytest is not installed"
        return
    assert stage.verdict == "failed"
    assert stage.details[-2:] == ["FAILED tests/test_ops.py::test_x", "1 failed, 2 passed in 3.4s"]
    assert ("-k" in commands[0]) == (missing is not None)
    assert all((gpu_check.ROOT / word).exists() for word in commands[0] if word.startswith("tests/"))


def sanitizer(folder: Path, script: str) -> None:
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed"),
        ("echo '=========     at void attn_ext::cuda::f()'; exit 9", "failed"),
        ("echo '=========     at void cublas()'; exit 9", "passed"),
        ("echo 'Device not supported'; exit 1", "not run to its end by all"),
        ("echo '========= Internal Sanitizer Error: The Sanitizer failed'; exit 9", "not run to its end by all"),
        ('echo "========= Error: process didn\'t terminate successfully"; exit 9', "not run to its end by all"),
    ],
)
def test_sanitizers_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, verdict: str) -> None:
    sanitizer(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stage = gpu_check.sanitizers(30)
    assert stage.verdict == verdict
    assert [line.split(":")[0] for line in stage.details if not line.startswith(" ")] == list(gpu_check.SANITIZERS)


def test_a_sanitizer_that_breaks_says_at_which_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer(tmp_path, "printf 'call: one\\ncall: other\\n========= Internal Sanitizer Error: x\\n'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    details = gpu_check.sanitizers(30).details
    assert details[:2] == ["memcheck: not run: Internal Sanitizer Error: x", "  the last call: other"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    process = python("-m", "benchmarks.gpu_check", cwd=gpu_check.ROOT)
    assert process.returncode == 1
    assert "there is no GPU to check on" in process.stderr


def test_a_changed_bit_is_found() -> None:
    results = iter(
        [[torch.zeros(3), torch.zeros(2)], [torch.zeros(3), -torch.zeros(2)], [torch.zeros(3), torch.zeros(2)]]
    )
    assert gpu_calls.changes(lambda: next(results), 3) == [1]


@pytest.mark.fused
def test_every_call_runs() -> None:
    """78 small ones, which the tools of the GPU make in turn: they are to leave the time to the measurements."""
    names = set()
    for name, call in gpu_calls.calls("cpu", large=False):
        names.add(name)
        assert all(result.isfinite().all() for result in call()), name
    masked = {word.rsplit(" ", 1)[-1] for word in names if "masked" in word}
    assert masked == set(gpu_calls.MASKINGS)


def test_calls_of_one_kind() -> None:
    every = [name for name, _ in gpu_calls.calls("cpu")]
    assert every == [name for kind in gpu_calls.KINDS for name, _ in gpu_calls.calls("cpu", kinds=[kind])]
    of_halves, none = (
        set(every) - {name for name, _ in gpu_calls.calls("cpu", products=products)} for products in ("float", "none")
    )
    left_out = {f"dot {sizes}" for sizes in gpu_calls.ROWS} | {"a loop of general", "a loop of concat"}
    assert {re.split(r",? b?float", name)[0] for name in none} == left_out
    assert of_halves == {name for name in none if "bfloat16" in name or "float16" in name}


def test_what_tests_make_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "DEVICE", "meta")
    for name, factory in on_device.factories():
        monkeypatch.setattr(torch, name, on_device.moved(factory))
    made = torch.randn(3, generator=torch.Generator(), requires_grad=True)
    assert made.is_meta
    assert made.is_leaf
    assert made.requires_grad
    assert torch.tensor([1.0]).is_meta
    assert torch.nn.Linear(2, 3).weight.is_meta
    assert torch.zeros(2, device="cpu").device.type == "cpu"
