"""benchmarks/: limits are measured, the targets' command runs and keeps what it found, wrong results are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bounds, compare, grid, guards, limits, load, report, standing, table, targets, timing
from benchmarks.decoder import DecoderLoop
from benchmarks.implementations import DIRECTIONS, EAGER, FUSED, METHODS, OPS, REFERENCE, Call, Problem
from benchmarks.shapes import GRID, GRID_COMPILED, GRID_SAMPLE, Shape, unnamed
from benchmarks.timing import SHORTEST_SAMPLE, Ratio, Schedule, WrongResultError, check, interleave, race, sample
from tests.processes import python

ROOT = Path(grid.__file__).parents[1]

pytestmark = pytest.mark.fused

INSTANT = Schedule(0.0, range(2, 3))
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16", "avx512_amx")  # each with those before it


@pytest.fixture(scope="module")
def _compiler() -> None:
    try:
        limits.compile_library("default")
    except limits.NoCompilerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def results(_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run over three targets wrote."""
    path = tmp_path_factory.mktemp("targets") / "results.json"
    process = python("-m", "benchmarks.targets", "--quick", "--only", "1", "4", "7", "--json", str(path), cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "7  the cost of a call" in process.stdout
    assert "targets' rows reached" in process.stdout
    return path


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_arithmetic_limits_are_plausible(capability: str) -> None:
    if CAPABILITIES.index(capability) > CAPABILITIES.index(limits.running_capability()):
        pytest.skip(f"this run is limited to {limits.running_capability()}")
    probes = [limits.probe(name, capability) for name in ("multiply-add", "additive forward", "additive backward")]
    rounds = [[sample(probe) for probe in probes] for _ in range(7)]  # in turns: whoever disturbs one, disturbs all
    best = [min(times) for times in zip(*rounds, strict=True)]
    multiply_add, forward, backward = (probe.amount / time for probe, time in zip(probes, best, strict=True))
    assert 1e9 < multiply_add < 1e14
    # An additive element takes at least two multiply-adds forward, and five backward; half of that allows for a whim.
    assert 1e7 < forward < multiply_add / 2
    assert 1e7 < backward < multiply_add / 5


@pytest.mark.usefixtures("_compiler")
def test_limits_of_given_tensors_go_through_all_of_them() -> None:
    threads = torch.get_num_threads()
    sources = [torch.randn(2, threads * limits.SHARE // 8), torch.randn(threads * limits.SHARE + 5)]
    copies = [torch.zeros_like(each) for each in sources]
    read, copy = limits.read_of(sources), limits.copy_of(sources, copies)
    assert read.amount == 5 * threads * limits.SHARE  # five floats are left over
    assert copy.amount == 2 * read.amount
    for each in copies:
        each.zero_()
    read()
    copy()
    assert torch.equal(copies[0], sources[0])
    assert torch.equal(copies[1][:-5], sources[1][:-5])


def test_without_a_compiler_the_message_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(limits.NoCompilerError, match="no-such-compiler does not run"):
        limits.compile_library("default")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(limits.NoCompilerError, match=r"put `c\+\+` on the PATH or name one in CXX"):
        limits.compile_library("default")


def test_the_results_have_all_that_their_readers_need(results: Path) -> None:
    data = json.loads(results.read_text())
    assert data["settings"].keys() >= {"machine", "software", "commit", "build"}
    assert data["limits"].keys() == set(limits.NAMES)
    for limit in data["limits"].values():
        assert 0 < limit["rate"] <= limit["best"]
    assert {finding["target"] for finding in data["findings"]} == {1, 4, 7}
    for finding in data["findings"]:
        assert finding.keys() >= {"kernel", "direction", "shape", "measure", "unit", "ratio", "wanted", "seconds"}
        assert finding["wanted"] is None or finding["verdict"].startswith(("reached", "missed by"))
    errors = [finding["ratio"]["value"] for finding in data["findings"] if finding["unit"] == "e"]
    assert len(errors) == 6
    assert max(errors) < 1e-12
    assert {point["implementation"] for point in data["memory"]} == {"fused", "eager"}
    assert all(curve["method"] == "dot" for curve in data["resident"])


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    settings = report.settings() | {"commit": "another"}
    path.write_text(json.dumps({"settings": settings}))
    with pytest.raises(SystemExit, match="another commit, machine or setting"):
        targets.Document(path)


def test_plots_are_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = json.loads(results.read_text())
    grid.measure(unnamed((1, 1, 7, 64)), INSTANT, [], lambda cell: data["grid"].append(cell.to_json()))
    data["resident"].append({"method": "dot", "sizes": (2, 2, 3, 8), "bytes": [10**8, 10**8]})
    complete = tmp_path / "results.json"
    complete.write_text(json.dumps(data))
    process = python("-m", "benchmarks.plots", str(complete), "--out", str(tmp_path / "docs"), cwd=ROOT)
    assert process.returncode == 0, process.stderr
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "docs").iterdir()}
    assert drawn.keys() == {
        f"{name}.{ending}" for name in ("limits", "grid", "memory", "resident") for ending in ("png", "svg")
    }
    assert min(drawn.values()) > 5000


def test_the_grid_goes_on_where_it_stopped() -> None:
    shapes = unnamed((1, 1, 7, 64), (2, 3, 5, 16))
    kept: list[dict[str, Any]] = []

    def stop_after_five(cell: grid.Cell) -> None:
        kept.append(json.loads(json.dumps(cell.to_json())))
        if len(kept) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid.measure(shapes, INSTANT, [], stop_after_five)
    done = [grid.Cell.from_json(each) for each in kept]
    new: list[grid.Cell] = []
    cells = grid.measure(shapes, INSTANT, done, new.append)
    assert len(cells) == len(shapes) * len(OPS) * 2
    assert len(new) == len(cells) - 5
    assert [cell for cell in cells if cell.key in {each.key for each in done}] == done
    assert "worst cell: " in grid.summary(cells)[-1]


def test_a_cell_is_lost_only_beyond_the_spread() -> None:
    cell = grid.Cell("dot", 1, 1, 7, 64, "forward", (1, 1, 7, 64))
    assert not cell.is_lost
    assert not replace(cell, ratios={"eager": Ratio(0.9, 0.8, 1.1)}).is_lost
    lost = replace(cell, ratios={"eager": Ratio(2.0, 1.9, 2.1), "SDPA": Ratio(0.9, 0.8, 0.95)})
    assert lost.is_lost
    assert lost.worst == ("SDPA", Ratio(0.9, 0.8, 0.95))


def test_the_sample_and_the_compiled_shapes_are_of_the_grid() -> None:
    assert len(GRID) == 4 * 4 * 5 * 5
    assert set(GRID_SAMPLE) <= set(GRID)
    assert set(GRID_COMPILED) <= set(GRID)


def test_a_peer_too_large_for_the_memory_is_skipped_by_name() -> None:
    (shape,) = unnamed((256, 256, 1000, 1024))
    reason = grid.why_skipped(EAGER, "additive", shape, "forward+backward")
    assert reason is not None
    assert "GB" in reason
    assert grid.why_skipped(FUSED, "additive", shape, "forward+backward") is None


@pytest.mark.parametrize("method", OPS)
def test_an_implementation_with_other_results_is_refused(method: str) -> None:
    def scaled(*arguments: Any, **options: Any) -> Any:
        context, weights = EAGER.attend(*arguments, **options)
        return context * 1.001, weights

    problem = Problem(method, Shape("", 2, 3, 5, 16))
    reference = Call(REFERENCE, problem, "forward+backward")
    check(Call(EAGER, problem, "forward+backward"), reference)
    with pytest.raises(WrongResultError, match="scaled: result 0 is off by"):
        check(Call(replace(EAGER, name="scaled", attend=scaled), problem, "forward+backward"), reference)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_is_the_same_whoever_attends(method: str, direction: str) -> None:
    loops = [DecoderLoop(name, method, Shape("", 2, 3, 5, 16), direction) for name in (FUSED.name, EAGER.name)]
    for loop in loops:
        check(loop, DecoderLoop(REFERENCE.name, method, Shape("", 2, 3, 5, 16), direction))


def test_a_slow_peer_is_timed_once() -> None:
    problem = Problem("dot", Shape("", 1, 1, 3, 4))
    calls = [Call(FUSED, problem, "forward"), Call(EAGER, problem, "forward")]
    assert [len(times) for times in interleave(calls, INSTANT).values()] == [2, 2]
    assert [len(times) for times in interleave(calls, replace(INSTANT, too_slow=0.0)).values()] == [2, 1]
    assert [len(times) for times in interleave(calls[:1], replace(INSTANT, too_slow=0.0)).values()] == [1]


@dataclass(frozen=True)
class Noted:
    """What is timed is its name in a list."""

    name: str
    made: list[str]
    active: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self) -> None:
        self.made.append(self.name)
        time.sleep(SHORTEST_SAMPLE)


def test_a_warm_sample_follows_an_untimed_call() -> None:
    made: list[str] = []
    a, b = Noted("a", made), Noted("b", made)
    sample(a, warm=True)
    assert made == ["a", "a"]
    made.clear()
    interleave([a, b], replace(INSTANT, warm=True, rounds=range(2, 3)))
    turns = made[2:]  # behind a first call of each
    assert turns[::2] == turns[1::2]
    assert [sorted(turns[i : i + 4]) for i in (0, 4)] == [["a", "a", "b", "b"]] * 2


def test_nobody_is_always_behind_the_same_one() -> None:
    made: list[str] = []
    calls = [Noted(name, made) for name in "abc"]
    seconds = interleave(calls, replace(INSTANT, rounds=range(50, 51)))
    assert [len(times) for times in seconds.values()] == [50] * 3
    rounds = {tuple(made[i : i + 3]) for i in range(len(made) - 150, len(made), 3)}
    assert rounds == {*permutations("abc")}


def test_a_raced_call_is_behind_everybody_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", range(50, 51))

    class Benchmark:
        stats = None

        def pedantic(self, calls: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
            for _ in range(rounds):
                setup()
                calls()

    made: list[str] = []
    a, b, call, probe = (Noted(name, made) for name in ("a", "b", "call", "probe"))
    race(Benchmark(), call, [a, b], [probe], warm=False, slow=1.0)
    rounds = " ".join(made).split(" call")[2:]  # behind two first calls of each
    assert {each.split()[-1] for each in rounds if each} == {"a", "b", "probe"}
    assert {tuple(sorted(each.split())) for each in rounds if each} == {("a", "b", "probe")}


SPEECH = Shape("speech", 4, 40, 400, 256)


def row_of(direction: str = "forward", share: Ratio | None = None, **ratios: Ratio) -> report.Row:
    rates = {"multiply-add": 2e11}
    return report.Row("op", "dot", SPEECH, direction, {"fused": 1e-3}, ratios, "multiply-add", share, rates, 1000, 0.0)


def run_of(commit: str, **ratios: Ratio) -> dict[str, Any]:
    """A report of speed-ups over peers, as pytest-benchmark writes it."""
    info = json.loads(json.dumps(row_of(**ratios).extra_info()))
    machine = {"attn_ext": {"machine": "one", "software": "PyTorch", "commit": commit}}
    return {"machine_info": machine, "benchmarks": [{"extra_info": info}]}


def test_a_row_of_the_report_comes_back_from_its_json() -> None:
    row = row_of(share=Ratio(0.5, 0.4, 0.6), eager=Ratio(2.0, 1.9, 2.1))
    assert report.rows_of({"benchmarks": [{"extra_info": json.loads(json.dumps(row.extra_info()))}]}) == [row]


def test_the_report_names_the_weakest_row_the_absent_and_the_disturbed() -> None:
    close = row_of(eager=Ratio(3.0, 2.9, 3.1), SDPA=Ratio(0.9, 0.8, 1.0))
    far = replace(row_of("forward+backward", eager=Ratio(2.0, 1.9, 2.1)), others=0.5)
    alone = replace(close, ratios={}, method="concat")  # no peer fits in memory
    lines = list(report.lines([far, close, alone], {"SpeechBrain": "is not installed"}))
    assert "SDPA 0.90x, eager 3.00x" in lines[-1]  # the closest first
    assert lines[-1].startswith("weakest")
    assert "absent    SpeechBrain: is not installed" in lines
    assert sum(line.startswith("disturbed 1 rows") for line in lines) == 1
    assert [" ! " in line for line in lines if line.startswith("dot ")] == [True, False]
    other = replace(far, shape=Shape("OCR", 1, 2, 3, 4))
    weakest, _, _, _, first, second = table.lines(
        [other, far, close, replace(close, method="general", ratios=far.ratios)]
    )
    assert weakest == "Weakest: dot, speech, forward: 0.90x the speed of SDPA (0.80 to 1.00)."
    assert first == "| speech | (4,40,400,256) | 0.90x SDPA, 2.00x eager | 2.00x eager |"
    assert second == "| OCR | (1,2,3,4) | 2.00x eager |  |"


def test_a_share_is_of_the_parts_together() -> None:
    probe = limits.Probe("probe", 10.0, "FLOP", lambda: None)
    other = replace(probe, name="other", amount=1.0)
    parts = [bounds.Part(probe, 5.0), bounds.Part(other, 4.0)]
    rounds = {"fused": [10.0, 20.0], "eager": [20.0, 20.0], "probe": [2.0, 4.0], "other": [1.0, 2.0]}
    row = report.Row.of("op", "dot", SPEECH, "forward", rounds, {"eager": "fused"}, parts, 0, 0.0)
    assert row.share == Ratio(0.5, 0.5, 0.5)  # (5/10 * 2 + 4 * 1) / 10, in both rounds
    assert row.bound == "other"
    assert row.ratios == {"eager": Ratio(1.5, 1.25, 1.75)}


@pytest.mark.usefixtures("_compiler")
def test_the_parts_of_a_bound() -> None:
    def amounts(method: str, shape: Shape, direction: str) -> dict[str, float]:
        return {part.probe.name: part.amount for part in bounds.parts(method, shape, direction)}

    many, one = Shape("", 2, 3, 5, 16), Shape("", 2, 1, 4096, 16)
    products = 4 * 2 * 3 * 5 * 16
    assert amounts("dot", many, "forward") == {"call": 1, "multiply-add": products}
    assert amounts("dot", many, "forward+backward") == {"call with gradient": 1, "multiply-add": 3 * products}
    assert amounts("general", many, "forward")["multiply-add"] == products + 2 * 2 * 3 * 16 * 16
    assert amounts("concat", many, "forward")["multiply-add"] == products / 2 + 2 * 2 * (3 + 5) * 16 * 16
    assert amounts("concat", many, "forward+backward")["additive backward"] == 2 * 3 * 5 * 16
    assert amounts("dot", one, "forward") == {"call": 1, "read, 0.52 MB": 4 * 2 * 4096 * 16}
    assert amounts("dot", replace(one, is_cold=True), "forward") == {"call": 1, "read": 4 * 2 * 4096 * 16}
    assert amounts("dot", one, "forward+backward")["copy, 0.52 MB"] == 2 * 4 * 2 * 4096 * 16


def test_the_work_of_others_is_what_is_not_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([load.Moment(100.0, 10.0, 0.0), load.Moment(103.0, 12.0, 2.0)])
    monkeypatch.setattr(load.Moment, "now", lambda: next(moments))
    assert load.others_since(load.Moment.now()) == 0.5  # 3 seconds of work, 2 of them one's own, in 2 by the clock


def test_a_busy_machine_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.9, 0.9, 0.0])
    monkeypatch.setattr(load, "others_since", lambda then: next(looks))
    monkeypatch.setattr(load, "LOOK", 0.01)
    assert load.wait_for_quiet(10.0) is None
    assert next(looks, None) is None  # it looked three times
    monkeypatch.setattr(load, "others_since", lambda then: 0.9)
    assert guards.busy_machine(patience=0.0).startswith("other processes keep 0.9 of the cores busy (")


def test_nothing_is_timed_while_its_tests_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test_it():\n    assert 1 == 2\n")
    green.write_text("def test_it():\n    pass\n")
    monkeypatch.setattr(guards, "ROOT", tmp_path)
    monkeypatch.setattr(guards, "TESTS", (str(green),))
    assert guards.red_tests() is None
    monkeypatch.setattr(guards, "TESTS", (str(red),))
    assert "assert 1 == 2" in guards.red_tests()


@pytest.mark.usefixtures("_compiler")
def test_the_speed_report_and_its_readers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept = tmp_path / "report.json"
    arguments = ("--benchmark", "--benchmark-unguarded", "-q", "-k", "1x1x24x128 and dot", f"--benchmark-json={kept}")
    process = python("-m", "pytest", "-p", "no:cacheprovider", *arguments, cwd=ROOT)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr
    assert "weakest   " in process.stdout
    rows = report.rows_of(json.loads(kept.read_text()))
    assert len(rows) == 2
    for row in rows:
        assert row.ratios.keys() >= {"eager", "compiled"}
        assert 0 < row.share.value < 2
    assert python("-m", "benchmarks.compare", kept, kept, cwd=ROOT).returncode == 0
    printed = python("-m", "benchmarks.table", kept, cwd=ROOT)
    assert printed.stdout.count("\n| ") == 2, printed.stderr  # the head, and one shape
    process = python("-m", "benchmarks.plots", kept, "--out", tmp_path / "docs", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    drawn = {path.name for path in (tmp_path / "docs").iterdir()}
    assert drawn == {"speedups.png", "speedups.svg"}


def test_the_speed_report_without_a_compiler() -> None:
    """torch.compile needs one, and so do the probes: both are named, and everybody else races."""
    arguments = ("--benchmark", "--benchmark-unguarded", "-q", "-k", "1x1x24x128 and dot and not backward")
    process = python("-m", "pytest", "-p", "no:cacheprovider", *arguments, cwd=ROOT, CXX="/no/such/compiler")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr
    assert "absent    compiled: does not compile here" in process.stdout
    assert "absent    limits: " in process.stdout
    assert "no compiler for the probes" in process.stdout


def test_what_is_compiled_for_two_instruction_sets_is_kept_apart() -> None:
    own = torch.backends.cpu.get_cpu_capability().lower()
    if own == "default":
        pytest.skip("this machine has one instruction set")
    code = (
        "from benchmarks import implementations; implementations.keep_compiled_apart(); "
        "from torch._inductor.runtime import cache_dir_utils; print(cache_dir_utils.cache_dir())"
    )
    folders = [python("-c", code, cwd=ROOT, ATEN_CPU_CAPABILITY=name).stdout for name in (own, "default")]
    assert all(folders)
    assert len(set(folders)) == 2


def test_the_roofline_is_drawn_where_its_limits_were_measured() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    rates = {"multiply-add": 2e11, "read": 2e10, "additive forward": 2e10}
    rows = [replace(row_of(eager=Ratio(2.0, 1.9, 2.1)), method=method, rates=rates) for method in METHODS]
    data = run_of("a") | {"benchmarks": [{"extra_info": row.extra_info()} for row in rows]}
    products, tanh_terms = plots.roofline(data).axes
    assert [len(axes.lines) for axes in (products, tanh_terms)] == [1 + 2, 1 + 1]
    assert plots.roofline(run_of("a", eager=Ratio(2.0, 1.9, 2.1))) is None


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (Ratio(2.0, 1.9, 2.1), "same"),
        (Ratio(2.2, 2.1, 2.3), "same"),  # beyond the quartiles, within the tolerance
        (Ratio(3.6, 3.5, 3.7), "faster"),
        (Ratio(3.6, 1.9, 5.3), "same"),  # a wide spread
        (Ratio(1.1, 1.05, 1.15), "slower"),
        (Ratio(1.4, 1.4, 1.4), "too few rounds"),
        (Ratio(1.4, 1.35, 1.45, 2), "too few rounds"),
    ],
    ids=str,
)
def test_a_comparison_respects_the_spread(new: Ratio, verdict: str) -> None:
    (change,) = compare.changes(run_of("a", eager=Ratio(2.0, 1.9, 2.1)), run_of("b", eager=new))
    assert change.verdict(compare.TOLERANCE) == verdict
    (pair,) = change.pairs.values()
    assert compare.Pair(pair.new, pair.old, at_most=True).verdict(compare.TOLERANCE) == verdict


def test_a_row_changed_where_most_of_its_ratios_did() -> None:
    two, four = Ratio(2.0, 1.9, 2.1), Ratio(4.0, 3.9, 4.1)
    old = run_of("a", eager=two, compiled=two, tutorial=two)
    (one_peer,) = compare.changes(old, run_of("b", eager=two, compiled=two, tutorial=four))
    assert one_peer.verdict(compare.TOLERANCE) == "same"
    (itself,) = compare.changes(old, run_of("b", eager=four, compiled=four, tutorial=two))
    assert itself.verdict(compare.TOLERANCE) == "faster"
    assert itself.gain == 2.0
    (unknown,) = compare.changes(
        old, run_of("b", eager=four, compiled=Ratio(4.0, 4.0, 4.0), tutorial=replace(two, rounds=2))
    )
    assert unknown.verdict(compare.TOLERANCE) == "faster"  # the others do not know


def test_a_comparison_as_a_program(results: Path, tmp_path: Path) -> None:
    for name, value in {"old": Ratio(2.0, 1.9, 2.1), "new": Ratio(1.1, 1.05, 1.15)}.items():
        (tmp_path / name).write_text(json.dumps(run_of(name, eager=value)))
    process = python("-m", "benchmarks.compare", tmp_path / "old", tmp_path / "new", cwd=ROOT)
    assert process.returncode == 1, process.stderr
    assert "commit    old  ->  new" in process.stdout
    assert "op dot (4,40,400,256) speech, forward against eager" in process.stdout
    assert "1 slower, 0 faster, 0 same, 0 too few rounds" in process.stdout
    assert python("-m", "benchmarks.compare", results, results, cwd=ROOT).returncode == 0
    mixed = python("-m", "benchmarks.compare", results, tmp_path / "new", cwd=ROOT)
    assert "cannot be compared: they have no row in common" in mixed.stderr
    (tmp_path / "broken").write_text("{")
    assert "cannot be read" in python("-m", "benchmarks.compare", results, tmp_path / "broken", cwd=ROOT).stderr


def test_the_tables_of_the_docs_are_those_of_the_records() -> None:
    """After a new record: `python -m benchmarks.standing --write docs/performance.md`."""
    text = (ROOT / "docs" / "performance.md").read_text()
    assert standing.rewritten(text) == text
    assert [found.group(2) for found in standing.BLOCK.finditer(text)] == list(standing.TABLES)


def recorded(
    folder: Path, name: str, *rows: tuple[int, str, str, tuple[int, int, int, int], str, str, float, float | None]
) -> str:
    """A record of such findings in `folder`: target, kernel, direction, sizes, measure, unit, value, wanted."""
    findings = [
        report.Finding(*row[:3], Shape("", *row[3]), *row[4:6], Ratio(*[row[6]] * 3), row[7], at_most=row[0] == 4)
        for row in rows
    ]
    data = {"settings": {"commit": "abc"}, "findings": [asdict(each) | {"verdict": each.verdict} for each in findings]}
    (folder / f"{name}.json").write_text(json.dumps(data))
    return name


def test_a_table_of_the_docs_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes, peak = (8, 256, 256, 512), "share of the multiply-add peak"
    rows = [
        (2, "dot", direction, sizes, f"{peak}, {kept}", "%", value, 0.85)
        for direction, kept, value in (
            ("forward", "weights", 0.9),
            ("forward", "no weights", 0.8),
            ("backward", "weights", 0.7),
            ("backward", "no weights", 0.6),
        )
    ]
    rows += [
        (2, "dot", "forward", sizes, "speed-up over eager", "x", 2.5, 2.0),
        (2, "dot", "forward", sizes, "speed-up over SDPA, no weights", "x", 1.5, 2.0),
        (2, "dot", "forward+backward", sizes, "speed-up over compiled", "x", 12.4, 2.0),
        (2, "dot", "forward+backward", sizes, "speed-up over eager, no weights", "x", 2.0, 2.0),
        (2, "torch.mm", "", sizes, peak, "%", 0.4, None),
    ]
    monkeypatch.setattr(standing, "RESULTS", tmp_path)
    name = recorded(tmp_path, "targets", *rows)
    steps = recorded(
        tmp_path, "steps", (4, "dot", "GRU", sizes, "fused: time over that without attention", "x", 1.2, 1.1)
    )
    machines = [standing.Machine(machine, name, steps, grid="") for machine in "AB"]
    monkeypatch.setattr(standing, "MACHINES", machines)
    cell = "90, 70 (80, 60) %<br>2.50 e, 12 c (1.50 s, 2.00 e)"
    assert list(standing.dot()) == ["| (B,T,S,D) | A | B |", "|---|---|---|", f"| (8,256,256,512) | {cell} | {cell} |"]
    shares, ratios, decoders, total = list(standing.summary())[2:]
    assert shares == f"| dot, many queries: share of the multiply-adds | 85 % |{' 80 to 90, 60 to 70 %: 1 of 4 |' * 2}"
    assert ratios.endswith(f" | 2x |{' 1.50 to 2.50, 2.00 to 12: 3 of 4 |' * 2}")
    assert decoders.endswith(f" | at most 1.1x |{' 1.20: 0 of 1 |' * 2}")
    assert total == f"| all rows but the decoders' |  |{' 4 of 8 |' * 2}"
    with pytest.raises(standing.NotARecordError, match="has no rows for Part"):
        list(standing.one_query())


def test_what_is_no_record_and_no_table_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(standing, "RESULTS", tmp_path)
    with pytest.raises(standing.NotARecordError, match=r"missing\.json cannot be read"):
        standing.record("missing")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(standing.NotARecordError, match="has none of the settings"):
        standing.record("other")
    with pytest.raises(standing.NotARecordError, match="has no findings"):
        standing.findings(recorded(tmp_path, "empty"))
    begin, end = "<!-- benchmarks.standing {} -->\n", "<!-- end -->"
    for text, message in {
        "no table": "it has no table",
        begin.format("grid"): "or one without an end",
        begin.format("nothing") + end: "there is no table nothing",
        begin.format("grid") + begin.format("dot") + end: "table grid has no end",
    }.items():
        with pytest.raises(standing.NotARecordError, match=message):
            standing.rewritten(text)


def test_the_tables_as_a_program(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks.standing grid -->\n<!-- end -->\n")
    assert python("-m", "benchmarks.standing", "--write", page, cwd=ROOT).returncode == 0
    printed = python("-m", "benchmarks.standing", "grid", cwd=ROOT).stdout
    table = printed.removeprefix("grid\n\n").rstrip("\n")
    assert page.read_text() == f"<!-- benchmarks.standing grid -->\n{table}\n<!-- end -->\n"
    page.write_text("no table")
    process = python("-m", "benchmarks.standing", "--write", page, cwd=ROOT)
    assert process.returncode == 1
    assert "page.md cannot be made: it has no table" in process.stderr
    assert "there is no table other" in python("-m", "benchmarks.standing", "other", cwd=ROOT).stderr
