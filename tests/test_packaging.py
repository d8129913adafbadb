"""setup.py: what it decides about CUDA, its flags, and that a source distribution is complete."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.limits import FLAGS_OF_CAPABILITY
from tests.processes import PACKAGE, python

ROOT = PACKAGE.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="attn_ext is installed without its sources")


def test_the_cpu_only_switch_decides() -> None:
    process = python("setup.py", "--name", cwd=ROOT, ATTN_EXT_CPU_ONLY="1")
    assert process.returncode == 0, process.stderr
    assert "attn_ext: CUDA no: ATTN_EXT_CPU_ONLY is set" in process.stdout.splitlines()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_without_cuda_in_pytorch_the_build_is_for_the_cpu_and_says_so() -> None:
    process = python("setup.py", "--name", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert f"attn_ext: CUDA no: PyTorch {torch.__version__} has no CUDA" in process.stdout.splitlines()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_forcing_cuda_where_there_is_none_is_an_error() -> None:
    process = python("setup.py", "--name", cwd=ROOT, FORCE_CUDA="1")
    assert process.returncode != 0
    assert f"attn_ext: FORCE_CUDA is set, but PyTorch {torch.__version__} has no CUDA" in process.stderr


def test_limits_are_compiled_as_the_kernels_are() -> None:
    """An instruction set's flags stand in setup.py, which nobody can import, and in benchmarks/limits.py."""
    program = """
import json, runpy, sys
sys.argv = ["setup.py", "--name"]
print(json.dumps(runpy.run_path("setup.py")["CPU_CAPABILITIES"]))
"""
    process = python("-c", program, cwd=ROOT, ATTN_EXT_CPU_ONLY="1")
    assert process.returncode == 0, process.stderr
    of_kernels = {name.lower(): tuple(flags) for name, flags in json.loads(process.stdout.splitlines()[-1]).items()}
    assert of_kernels == {name: FLAGS_OF_CAPABILITY[name] for name in of_kernels}
    assert len(of_kernels) in (1, len(FLAGS_OF_CAPABILITY))  # one elsewhere than on x86-64


def test_the_sdist_carries_every_source_and_page(tmp_path: Path) -> None:
    # A list of an earlier one, beside the sources, would be added to what this one carries.
    command = ("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    process = python("setup.py", "-q", *command, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    (archive,) = tmp_path.glob("attn_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        carried = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    made = {".so", ".pyc"}
    folders = ("attn_ext", "csrc", "tests", "benchmarks", "examples", "docs")
    wanted = {
        path.relative_to(ROOT)
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in made and not path.name.startswith(".")
    }
    wanted |= {Path(name) for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "conftest.py")}
    wanted.add(Path(".clang-format"))
    assert wanted - carried == set()
