"""The CUDA kernels behind the ops, run on the CPU (tests/cuda): a sample of the tests of the ops.

All of a file's: pytest -p tests.cuda.plugin tests/test_masking.py
"""

from __future__ import annotations

import subprocess

import pytest

from tests.cuda.compiler import compiler, host_library
from tests.processes import PACKAGE, python

FILES = ("against_reference", "dot", "additive", "masking", "layouts", "precision", "gradients", "ops", "memory")

pytestmark = [pytest.mark.fused, pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")]


def run(sample: int, files: tuple[str, ...], **environment: str) -> None:
    process = python(
        *("-m", "pytest", "-p", "tests.cuda.plugin", "-p", "no:cacheprovider", "-q", "--tb=short"),
        *("--sample", str(sample), *(f"tests/test_{name}.py" for name in files)),
        cwd=PACKAGE.parent,
        OMP_NUM_THREADS="1",
        **environment,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]


def test_a_sample_of_the_tests_of_the_ops() -> None:
    run(23, FILES)


def test_under_sanitizers() -> None:
    """With AddressSanitizer's runtime the shim asks whose memory an access to global memory is."""
    # With the C++ library, whose exceptions it would look for before there is one: Triton's import throws some.
    libraries = [library_of_the_compiler(name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(library.startswith("/") for library in libraries):
        pytest.skip("the compiler has no shared AddressSanitizer")
    host_library(undefined=True)  # compiled here: the sanitizer is not for the compiler
    run(61, FILES[:6], LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0", ATTN_EXT_UNDEFINED="1")


def library_of_the_compiler(name: str) -> str:
    """Its path, or the name alone where there is none."""
    return subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
