"""use_backend, ATTN_EXT_BACKEND, and what happens where nothing that runs is compiled."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attn_ext
from attn_ext import backend
from tests.cases import Case, assert_accurate
from tests.processes import PACKAGE, python


def test_setter() -> None:
    for name in ("reference", "auto"):
        attn_ext.use_backend(name)
        assert backend.current() == name


def test_context_manager() -> None:
    before = backend.current()
    with attn_ext.use_backend("reference"):
        assert backend.current() == "reference"
        with attn_ext.use_backend("auto"):
            assert backend.current() == "auto"
        assert backend.current() == "reference"
    assert backend.current() == before


@pytest.fixture
def restored() -> Iterator[None]:
    before = backend.current()
    yield
    attn_ext.use_backend(before)


@pytest.mark.usefixtures("restored")
def test_a_choice_can_be_entered_again() -> None:
    reference = attn_ext.use_backend("reference")
    attn_ext.use_backend("auto")
    for _ in range(2):
        with reference:
            assert backend.current() == "reference"
        assert backend.current() == "auto"


@pytest.mark.usefixtures("restored")
def test_a_choice_that_is_entered_later_ends_with_what_it_replaced() -> None:
    auto = attn_ext.use_backend("auto")
    attn_ext.use_backend("reference")
    with auto, auto:
        assert backend.current() == "auto"
    assert backend.current() == "reference"


@pytest.mark.usefixtures("restored")
def test_a_choice_that_has_been_made_again_since() -> None:
    late = attn_ext.use_backend("reference")
    attn_ext.use_backend("auto")
    attn_ext.use_backend("reference")
    with late:
        assert backend.current() == "reference"
    assert backend.current() == "reference"


def test_a_choice_within_itself_leaves_the_outer_one() -> None:
    before = backend.current()
    reference = attn_ext.use_backend("reference")
    with reference:
        with reference:
            assert backend.current() == "reference"
        assert backend.current() == "reference"
    assert backend.current() == before


def test_context_manager_ends_what_was_set_inside() -> None:
    before = backend.current()
    with attn_ext.use_backend("reference"):
        attn_ext.use_backend("auto")
    assert backend.current() == before


def test_context_manager_and_exceptions() -> None:
    before = backend.current()
    with pytest.raises(KeyError), attn_ext.use_backend("reference"):
        raise KeyError
    assert backend.current() == before


@pytest.mark.parametrize("name", ["Fused", "", None, 1, torch.zeros(2)], ids=repr)
def test_wrong_name(name: object) -> None:
    before = backend.current()
    with pytest.raises(ValueError, match=r"^use_backend: name is .*, needed is one of 'auto', 'fused', 'reference'$"):
        attn_ext.use_backend(name)
    assert backend.current() == before


@pytest.mark.fused
@pytest.mark.parametrize(("device", "more"), [("xpu", "there are some for"), ("cuda", "CUDA: .*To rebuild it, run")])
def test_fused_where_no_kernel_is(device: str, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that this build has no kernels for: refused under "fused", one warning under "auto"."""
    monkeypatch.setattr(backend, "fused_devices", ("cpu", "meta"))
    backend._warn.cache_clear()
    why = f"no kernels are compiled for {device} tensors.*{more}"
    with attn_ext.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match=f"slower reference implementation, because {why}") as caught:
            assert not backend.fused_runs_on(device)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not backend.fused_runs_on(device)
    with attn_ext.use_backend("fused"), pytest.raises(RuntimeError, match=why):
        backend.fused_runs_on(device)


def test_wrong_name_in_the_environment_variable() -> None:
    process = python("-c", "import attn_ext", cwd=PACKAGE.parent, ATTN_EXT_BACKEND="fast")
    assert process.returncode != 0
    assert (
        "ValueError: ATTN_EXT_BACKEND: its value is 'fast', needed is one of 'auto', 'fused', 'reference'"
        in process.stderr
    )


# Every method, forward and backward; what it warned of, how it refuses to be "fused", and its info.
EXERCISE = """
import warnings
import torch
import attn_ext
import attn_ext.info

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    attn_ext.use_backend("auto")
    query, memory = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    for _ in range(2):
        attn_ext.LuongAttention("dot", 4)(query, memory)  # the line that is warned of
        context, weights = attn_ext.luong_attention(query, memory)
        context.sum().backward()
        attn_ext.LuongAttention("concat", 4)(query, memory, lengths=[5, 0])
        attn_ext.LuongAttention("general", 4)(query, memory)
expected = torch.softmax(query @ memory.mT, -1)
torch.testing.assert_close(weights, expected)
torch.testing.assert_close(context, expected @ memory)
assert query.grad.abs().max() > 0
assert [warning.filename for warning in caught] == ["<string>"]
for warning in caught:
    print(warning.category.__name__, warning.message, sep=": ")
try:
    attn_ext.use_backend("fused")
except RuntimeError as error:
    print(error)
attn_ext.info.main()
"""
REBUILD = "run in attn_ext's source folder: pip install --no-build-isolation --force-reinstall --no-deps ."


@pytest.fixture
def copy_without_extension(tmp_path: Path) -> Path:
    """A folder with the package as it is before anything is compiled."""
    shutil.copytree(PACKAGE, tmp_path / "attn_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.fixture
def copy_for_another_pytorch(copy_without_extension: Path) -> Path:
    """A folder with the package as if compiled for PyTorch 1.13: only what is read before the extension is loaded."""
    package = copy_without_extension / "attn_ext"
    facts = {"torch_version": "1.13.0+cu117", "compiler": "gcc 9", "cpu_capabilities": "DEFAULT", "cuda": "11.7"}
    (package / "_build_info.py").write_text(f"def facts():\n    return {facts!r}\n")
    (package / "_C.py").write_text("raise ImportError('of another PyTorch')\n")
    return copy_without_extension


def assert_falls_back(folder: Path, why: str, extension: str) -> None:
    """One warning that says what to do, right results, a refusal to be "fused", and the same reason from info."""
    process = python("-c", EXERCISE, cwd=folder)
    assert process.returncode == 0, process.stderr
    warning, refusal, *lines = process.stdout.splitlines()
    assert warning == f"RuntimeWarning: attn_ext runs its slower reference implementation, because {why}"
    assert refusal == f"use_backend: the fused ops cannot run: {why}"
    assert f"{'extension:':<20}{extension}" in lines
    assert f"{'cpu tensors run:':<20}reference, because {why}" in lines


def test_compile_where_nothing_is_compiled(copy_without_extension: Path) -> None:
    """One graph, without a look into what loads and warns."""
    program = """
import torch, attn_ext

compiled = torch.compile(attn_ext.luong_attention, backend="eager", fullgraph=True)
query, memory = torch.randn(2, 4), torch.randn(2, 5, 4)
torch.testing.assert_close(compiled(query, memory), attn_ext.luong_attention(query, memory))
"""
    process = python("-c", program, cwd=copy_without_extension)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("attn_ext runs its slower reference implementation") == 1


def test_nothing_compiled(copy_without_extension: Path) -> None:
    why = f"the extension is not compiled. To build it, {REBUILD}"
    assert_falls_back(copy_without_extension, why, extension="not compiled")


def test_nothing_compiled_in_the_source_folder(copy_without_extension: Path) -> None:
    """Python finds the sources there before what is installed: the advice to install would lead in a circle."""
    (copy_without_extension / "setup.py").touch()
    why = (
        f"the extension is not compiled in {copy_without_extension}, from where attn_ext is imported. To build it, run"
        " there: python setup.py build_ext --inplace. If it is installed, too, Python finds that one from any other"
        " folder"
    )
    assert_falls_back(copy_without_extension, why, extension="not compiled")


def test_built_for_another_pytorch(copy_for_another_pytorch: Path) -> None:
    """Both versions are named."""
    built_for, running = "1.13.0+cu117", torch.__version__
    why = f"the extension was built for PyTorch {built_for}, but this is PyTorch {running}. To rebuild it, {REBUILD}"
    assert_falls_back(copy_for_another_pytorch, why, extension=f"built for PyTorch {built_for} by gcc 9")


@pytest.mark.fused
@pytest.mark.parametrize(("build", "runs"), [("", True), ("+cpu", True), ("+cu130", True), (".1", False)])
def test_builds_of_one_release_share_an_extension(build: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever devices PyTorch is built for, its C++ interface is the release's."""
    facts = backend.build_facts() | {"torch_version": torch.__version__.split("+")[0] + build}
    monkeypatch.setattr(backend, "build_facts", lambda: facts)
    problem = backend._load.__wrapped__()
    assert problem is None if runs else "was built for PyTorch" in problem


def test_fused_by_environment_where_nothing_is_compiled(copy_without_extension: Path) -> None:
    """Asked for by name, the reference is no substitute: an error at the first call, not a warning."""
    call = "import torch, attn_ext; attn_ext.dot_attention(torch.zeros(1, 2), torch.zeros(1, 3, 2))"
    process = python("-c", call, cwd=copy_without_extension, ATTN_EXT_BACKEND="fused")
    assert process.returncode != 0
    assert "RuntimeError: attn_ext: the backend is 'fused', but the fused ops cannot run: " in process.stderr
    assert REBUILD in process.stderr


def test_results_agree_between_backends() -> None:
    """A change of backend in the middle of a graph: each call's backward pass is its forward pass's."""
    problem = Case("concat", S=37, D=20, dtype=torch.float64).problem()
    assert_accurate(problem)
    query = problem.tensors["query"].requires_grad_()
    grads = []
    for during_backward in ("reference", "auto"):
        context, _ = problem.function(**problem.tensors)
        with attn_ext.use_backend(during_backward):
            grads.append(torch.autograd.grad(context.sum(), query)[0])
    assert torch.equal(*grads)
