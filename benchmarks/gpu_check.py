"""Everything there is to check on a machine with a GPU, in one report: `make gpu-check`, within about eight minutes.

Builds for the GPU that is there, runs the tests of the ops on it, has compute-sanitizer look at small calls, compares
runs bit by bit, and measures decoders' training steps and speed. A stage that cannot run says why, and the next one
runs. The report, JSON and Markdown, stands in benchmarks/results/ by the names of GPU, PyTorch and commit, and is
written anew after every stage; all that the stages' commands said stands in build/gpu_check/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_calls, gpu_steps
from benchmarks.machine import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOGS = ROOT / "build" / "gpu_check"
PYTHON_PATH = [path for path in [os.environ.get("PYTHONPATH")] if path]

# Tests of what runs on a device, and those of them that need a package besides.
TESTS = (
    "against_reference", "dot", "additive", "gradients", "masking", "layouts", "precision", "ops", "memory", "modules",
    "decoder", "beam", "modes", "errors",
)  # fmt: skip
NEEDS = {"expecttest": "opcheck or one_step_without_its_dimension"}
# The tools' looks, by name, and the calls they look at. racecheck breaks where a kernel does: a process for each kind.
SANITIZERS: dict[str, list[str]] = {
    "memcheck": [],
    **{f"racecheck of {kind}": ["--only", kind, "--products", "float"] for kind in gpu_calls.KINDS},
    "initcheck": ["--products", "none"],
    "synccheck": [],
}
# Said where a tool did not come to its end, whatever it had found.
BROKEN = re.compile(r"Internal Sanitizer Error.*|process didn't terminate successfully")

# Seconds a stage may take, at most and as a share of what is left of the whole.
LIMITS = {
    "build": (240, 0.6),
    "tests": (240, 0.5),
    "sanitizers": (120, 0.5),
    "same bits": (60, 0.5),
    "training steps": (60, 0.4),
    "speed": (1e9, 1.0),
}


@dataclass
class Stage:
    """What came of one stage. `verdict`: "passed", "failed", or "not run: why"."""

    name: str
    verdict: str
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)
    data: Any = None


def run(
    command: Sequence[str | Path], limit: float, log: str | None = None, **environment: str
) -> tuple[int | None, str]:
    """Exit status, None where the time ended it, and all that was said. What the command started ends with it."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *PYTHON_PATH])} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        status = None
    if log is not None:
        LOGS.mkdir(parents=True, exist_ok=True)
        (LOGS / f"{log}.txt").write_text(said)
    return status, said


def last_lines(said: str, count: int = 12) -> list[str]:
    # Frames of a C++ exception would push out what it says.
    lines = [line.rstrip()[:300] for line in said.splitlines()]
    return [line for line in lines if line and not line.startswith("frame #")][-count:]


def verdict_of(status: int | None, limit: float) -> str:
    return "passed" if status == 0 else "failed" if status is not None else f"not run to its end in {limit:.0f} s"


def build(limit: float) -> Stage:
    status, said = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], limit, "build", MAX_JOBS=str(os.cpu_count())
    )
    details = [line for line in said.splitlines() if line.startswith("attn_ext:")]
    if status != 0:
        return Stage("build", verdict_of(status, limit), details=details + last_lines(said, 40))
    status, said = run([sys.executable, "-m", "attn_ext.info"], 60)
    details += said.splitlines()
    runs = re.search(r"^cuda tensors run:\s+fused", said, re.MULTILINE)
    size = sum(path.stat().st_size for path in (ROOT / "attn_ext").glob("*.so"))
    details.append(f"the libraries have {size / 1e6:.1f} MB")
    return Stage("build", "passed" if status == 0 and runs else "failed", details=details)


def tests(limit: float) -> Stage:
    if importlib.util.find_spec("pytest") is None:
        return Stage("tests", "not run: pytest is not installed")
    details = []
    plugins = ("-p", "tests.cuda.on_device", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rN", "--durations=10", *plugins]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    for package, names in NEEDS.items():
        if importlib.util.find_spec(package) is None:
            details.append(f"left out: {names}, for {package} is not installed")
            command += ["-k", f"not ({names})"]
    files = [f"tests/test_{name}.py" for name in TESTS]
    status, said = run([*command, *files], limit, "tests", ATTN_EXT_TEST_DEVICE="cuda", ATTN_EXT_BACKEND="fused")
    failed = [line[:300] for line in re.findall(r"(?:FAILED|ERROR) tests/.*", said)]  # behind dots, with xdist
    details += failed[:60] + last_lines(said, 1 if failed else 6)
    return Stage("tests", verdict_of(status, limit), details=details)


def sanitizers(limit: float) -> Stage:
    """All at once: most of their time is Python's start, and seven processes fit on a GPU."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        return Stage("sanitizers", "not run: there is no compute-sanitizer")

    def look(which: str) -> tuple[str, str, list[str]]:
        name = which.split()[0]
        # Without PyTorch's cache each tensor is an allocation of its own, which ends where the tensor does. Only
        # initcheck has to see what others' kernels do: they write what ours read.
        ours_alone = [] if name == "initcheck" else ["--kernel-name", "kns=attn_ext"]
        command = [tool, "--tool", name, *ours_alone, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.gpu_calls", "--verbose", *SANITIZERS[which]]
        # A launch that breaks does so at its own call.
        status, said = run(command, limit, which, PYTORCH_NO_CUDA_MEMORY_CACHING="1", CUDA_LAUNCH_BLOCKING="1")
        ours = [line[:300] for line in said.splitlines() if line.startswith("=========") and "attn_ext" in line]
        summary = [line for line in said.splitlines() if "SUMMARY" in line]
        broken = BROKEN.search(said)
        if broken or status != 0:
            calls = [line for line in said.splitlines() if line.startswith(gpu_calls.CALL)]
            summary += [f"the last {call}" for call in calls[-1:]]
        if status is not None and not ours and (broken or status not in (0, 9)):
            return (
                which,
                f"not run: {broken.group() if broken else f'exit status {status}'}",
                summary + last_lines(said),
            )
        if status == 9 and not ours:
            return which, "passed, but for reports of others' kernels", summary
        return which, verdict_of(status, limit), ours[:20] + summary

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(look, SANITIZERS))
    verdicts = [verdict for _, verdict, _ in found]
    verdict = "passed" if all(each.startswith("passed") for each in verdicts) else "not run to its end by all"
    details = []
    for which, its_own, said in found:
        details += [f"{which}: {its_own}", *(f"  {line}" for line in said)]
    return Stage("sanitizers", "failed" if "failed" in verdicts else verdict, details=details)


def same_bits(limit: float) -> Stage:
    status, said = run([sys.executable, "-m", "benchmarks.gpu_calls", "--repeat", "10"], limit, "same bits")
    return Stage("same bits", verdict_of(status, limit), details=last_lines(said))


def measured(name: str, module: str, limit: float) -> Stage:
    """A stage whose module writes what it has measured as it goes: a last number may take its time."""
    file = ROOT / "build" / f"{module}.json"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    minutes = f"{max(limit - 20, 20) / 60:.2f}"
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", file, "--minutes", minutes]
    status, said = run(command, limit + 30, name)
    data = json.loads(file.read_text()) if file.exists() else None
    return Stage(name, verdict_of(status, limit), details=last_lines(said) if status != 0 else [], data=data)


def training_steps(limit: float) -> Stage:
    return measured("training steps", "gpu_steps", limit)


def speed(limit: float) -> Stage:
    return measured("speed", "gpu_speed", limit)


STAGES: dict[str, Callable[[float], Stage]] = {
    "build": build,
    "tests": tests,
    "sanitizers": sanitizers,
    "same bits": same_bits,
    "training steps": training_steps,
    "speed": speed,
}


def facts(commit: str) -> dict[str, str]:
    """What every number depends on."""
    properties = torch.cuda.get_device_properties(0)
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    _, said = (
        run(["nvidia-smi", f"--query-gpu={query}", "--format=csv", "--id=0"], 20)
        if shutil.which("nvidia-smi")
        else (0, "")
    )
    return {
        "GPU": f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
        f"{properties.total_memory / 2**30:.0f} GiB",
        "nvidia-smi": " | ".join(said.split("\n")).strip(" |") or "not there",
        "software": f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
        "host": f"{os.cpu_count()} cores, {platform.platform()}",
        "commit": commit,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


# The report.


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def speed_table(data: dict[str, Any]) -> list[str]:
    """A row a workload; a peer's number has its ratio to the fused op's beside it."""
    ceilings = data["ceilings"]
    products = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in ceilings["products"].items())
    lines = [
        f"Ceilings: copy {ceilings['bytes'] / 1e12:.2f} TB/s and products {products}, measured; "
        f"{ceilings['special'] / 1e12:.2f} T special functions/s and {ceilings['instructions'] / 1e12:.1f} T "
        "instructions/s, by the clock.",
        "",
        "Medians in microseconds, inputs not in the L2 cache, CUDA graphs replayed; in brackets others' time over the "
        "fused op's.",
        "",
        "| method | (B, T, S, H) | dtype | direction | floor | fused | share of the floor | fused, called | peers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reached = [row for row in data["rows"] if row["seconds"]]
    for row in reached:
        fused = row["seconds"].get("fused")
        peers = [
            f"{name} {microseconds(seconds)}" + (f" ({seconds / fused:.2f}x)" if fused else "")
            for name, seconds in row["seconds"].items()
            if name != "fused"
        ]
        for why in dict.fromkeys(row["missing"].values()):
            names = ", ".join(name for name, its_own in row["missing"].items() if its_own == why)
            peers.append(f"{names}: {why}")
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        if row["wanted"]:
            share += f" (wanted {row['wanted']:.0%})"
        called = row["called"].get("fused")
        lines.append(
            f"| {row['method']} | {tuple(row['sizes'])} | {row['dtype']} | {row['direction']} "
            f"| {microseconds(row['floor'][row['bound']])}, {row['bound']} "
            f"| {microseconds(fused) if fused else '-'} | {share} "
            f"| {microseconds(called) if called else '-'} | {'; '.join(peers).replace('|', '/')} |"
        )
    if len(reached) < len(data["rows"]):
        lines += ["", f"The time was over before {len(data['rows']) - len(reached)} more of them."]
    return lines


TABLES: dict[str, Callable[[Any], list[str]]] = {"training steps": gpu_steps.table, "speed": speed_table}


def markdown(about: dict[str, str], stages: Sequence[Stage]) -> str:
    lines = [f"# GPU check: {about['GPU'].split(',')[0]}, commit {about['commit']}", ""]
    lines += [f"- {name}: {text}" for name, text in about.items()]
    lines += ["", "| stage | verdict | seconds |", "|---|---|---|"]
    lines += [f"| {stage.name} | {stage.verdict} | {stage.seconds:.0f} |" for stage in stages]
    for stage in stages:
        if stage.data is not None:
            lines += ["", f"## {stage.name}", "", *TABLES[stage.name](stage.data)]
        if stage.details:
            lines += ["", f"## {stage.name}: what was said", "", "```", *stage.details, "```"]
    return "\n".join(lines) + "\n"


def name_of_report(about: dict[str, str]) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", about["GPU"].split(",")[0].lower()).strip("-")
    version = torch.__version__.split("+")[0]
    return f"{gpu}-torch-{version}-{about['commit'].rstrip('+')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--commit", default=commit(), metavar="NAME", help="where the files are not in a repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"there is no GPU to check on: PyTorch {torch.__version__} sees none")
    deadline = time.monotonic() + 60 * arguments.minutes
    about = facts(arguments.commit)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = arguments.out / name_of_report(about)
    done: list[Stage] = []
    for name in arguments.only:
        begin = time.monotonic()
        most, share = LIMITS[name]
        limit = max(min(most, share * (deadline - begin)), 15)
        try:
            stage = STAGES[name](limit)
        except Exception as error:  # the stages after it are worth having all the same
            stage = Stage(name, f"not run: {type(error).__name__}: {error}")
        stage.seconds = time.monotonic() - begin
        done.append(stage)
        print(
            f"{name}: {stage.verdict} ({stage.seconds:.0f} s)",
            *(f"  {line}" for line in stage.details),
            sep="\n",
            flush=True,
        )
        report.with_name(report.name + ".json").write_text(
            json.dumps({"about": about, "stages": [asdict(each) for each in done]}, indent=1) + "\n"
        )
        report.with_name(report.name + ".md").write_text(markdown(about, done))
        if name == "build" and stage.verdict != "passed":
            break
    for stage in done:
        if stage.data is not None:
            print(*TABLES[stage.name](stage.data), sep="\n")
    print(f"the report: {report}.md")
    sys.exit(0 if all(stage.verdict == "passed" for stage in done) else 1)


if __name__ == "__main__":
    main()
