"""CUDA sources where there is a compiler and no GPU: every architecture, no spill, no stack frame, no warning."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.compilers import BUILD, ROOT

NVCC = shutil.which("nvcc", path=os.pathsep.join([f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ["PATH"]]))
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HOST_CODE = [*sorted((ROOT / "csrc" / "cuda").glob("*.cpp")), ROOT / "csrc" / "ops.cpp"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")


@dataclass(frozen=True)
class Function:
    """What ptxas says of one function for one architecture."""

    name: str
    architecture: int
    stack: int
    spilled: int
    registers: int = 0
    shared: int = 0


def architectures() -> list[int]:
    """Those that setup.py builds for."""
    listed = re.search(r'CUDA_ARCHITECTURES = "(.+)"', (ROOT / "setup.py").read_text())
    assert listed is not None
    return [int(version.removesuffix("+PTX").replace(".", "")) for version in listed.group(1).split(";")]


def with_headers(source: Path) -> list[Path]:
    """The source and what it includes of this project, in turn."""
    found = [source]
    for file in found:
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            header = (file.parent / name).resolve()
            if header.exists() and header not in found:
                found.append(header)
    return found


def remembered(source: Path, command: list[str], run: Callable[[Path], str]) -> str:
    """What the compiler said, once for each content of the sources it said it of."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    contents = (version, *command, *(path.read_text() for path in with_headers(source)))
    key = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
    said = BUILD / "compiled" / f"{source.name}-{key}.txt"
    if not said.exists():
        said.parent.mkdir(parents=True, exist_ok=True)
        text = run(said.with_suffix(".o"))
        said.with_suffix(".new").write_text(text)
        said.with_suffix(".new").replace(said)
    return said.read_text()


def said_by_nvcc(source: Path) -> str:
    """Device and host code of a source, for all the architectures at once."""
    assert NVCC is not None
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures()]
    command = [NVCC, "-std=c++20", "-O3", *targets, "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v,-warn-spills", "-c"]

    def run(to: Path) -> str:
        process = subprocess.run([*command, str(source), "-o", str(to)], capture_output=True, text=True)
        to.unlink(missing_ok=True)
        assert process.returncode == 0, process.stderr
        return process.stderr

    return remembered(source, command, run)


def functions(said: str) -> list[Function]:
    """The functions that ptxas reports on, in the words of `-v`."""
    if shutil.which("c++filt"):
        said = subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True).stdout
    lines = iter(said.splitlines())
    found: list[Function] = []
    architecture = 0
    for line in lines:
        if match := re.search(r"Compiling entry function '.*' for 'sm_(\d+)", line):
            architecture = int(match.group(1))
        elif match := re.search(r"Function properties for (.+)", line):
            numbers = [int(number) for number in re.findall(r"(\d+) bytes", next(lines))]
            name = re.sub(r"^void |attn_ext::cuda::|\(.*", "", match.group(1))
            found.append(Function(name, architecture, numbers[0], numbers[1] + numbers[2]))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1] = replace(found[-1], registers=int(match.group(1)), shared=int(shared.group(1)) if shared else 0)
    return found


def complaints(said: str) -> list[str]:
    # A spill is a line of its function's too, which says for which architecture.
    warnings = [line for line in said.splitlines() if "warning" in line and "spilled to local memory" not in line]
    return warnings + [
        f"{of.name} for sm_{of.architecture}: {of.stack} bytes of stack, {of.spilled} spilled"
        for of in functions(said)
        if of.stack or of.spilled
    ]


def table(all_functions: list[Function]) -> str:
    """Registers by architecture, a kernel a line."""
    columns = sorted({of.architecture for of in all_functions})
    rows: dict[str, dict[int, Function]] = {}
    for of in all_functions:
        rows.setdefault(of.name, {})[of.architecture] = of
    width = max(map(len, rows))
    heads = "".join(f"{f'sm_{column}':>7}" for column in columns)
    lines = [f"{'registers':{width}} {heads}  static shared memory"]
    for name, row in sorted(rows.items()):
        registers = "".join(f"{row[column].registers if column in row else '-':>7}" for column in columns)
        lines.append(f"{name:{width}} {registers}  {max(of.shared for of in row.values())} bytes")
    return "\n".join(lines)


def test_no_kernel_spills(record_property: Callable[[str, object], None]) -> None:
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(said_by_nvcc, KERNELS))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report = table([of for text in said for of in functions(text)])
    report += f"\nnvcc took {time.perf_counter() - begin:.0f} s, {busy:.0f} s of processor time"
    record_property("kernels compiled by nvcc", report)
    found = [line for text in said for line in complaints(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", HOST_CODE, ids=lambda path: path.name)
def test_host_code_compiles_against_the_cpu_wheel(source: Path) -> None:
    """PyTorch's wheel for the CPU has c10's CUDA headers, though not the file that says how they were configured."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    assert NVCC is not None
    # What lies on the PATH may be a script: the compiler itself tells where it stands.
    plan = subprocess.run([NVCC, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    toolkit = Path(re.findall(r"TOP=(.+)", plan)[0]) / "include"
    defines = ["-DATTN_EXT_WITH_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DTORCH_EXTENSION_NAME=_C"]
    includes = [f"-isystem{path}" for path in (*include_paths("cpu"), toolkit)]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *defines, *includes]

    def run(_: Path) -> str:
        process = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stderr

    assert remembered(source, command, run) == ""


SPILLING = """
__global__ void __launch_bounds__(1024) spills(const float* in, float* out) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = in[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = x[63 - i] * x[(i * 7) % 64];
}
"""


def test_a_spill_does_not_pass(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLING)
    said = said_by_nvcc(source)
    found = functions(said)
    assert [of.architecture for of in found] == architectures()
    assert all(of.registers == 64 and of.stack and of.spilled for of in found)
    assert len(complaints(said)) == len(found)
