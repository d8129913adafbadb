"""benchmarks/packages.py and the tutorial form: they compute what the reference does, and what is absent is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import packages
from benchmarks.implementations import OPS, REFERENCE, TUTORIAL, Call, Implementation, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import check

METHODS = (*OPS, "concat")


def check_all_methods(implementation: Implementation, T: int) -> None:
    for method in METHODS:
        for need_weights in (True, False):
            if implementation.accepts(method, need_weights):
                problem = Problem(method, Shape("", 3, T, 7, 16))
                reference = Call(REFERENCE, problem, "forward+backward", need_weights)
                check(Call(implementation, problem, "forward+backward", need_weights), reference)


def process_wide_settings() -> list[object]:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state().tolist()
    return [torch.get_default_dtype(), torch.get_default_device(), threads, torch.is_grad_enabled(), state]


@pytest.fixture(scope="module")
def loaded() -> tuple[dict[str, Implementation], dict[str, str]]:
    """The implementations by name, and the reasons of the absent."""
    before = process_wide_settings()
    found, absent = packages.load()
    assert process_wide_settings() == before  # or the others would not be timed as they are
    return {each.name: each for each in found}, absent


@pytest.mark.parametrize("T", [1, 5])
def test_the_tutorial_form_equals_the_reference(T: int) -> None:
    assert not TUTORIAL.accepts("additive", True)
    check_all_methods(TUTORIAL, T)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("name", packages.PEERS)
def test_a_package_equals_the_reference(
    name: str, T: int, loaded: tuple[dict[str, Implementation], dict[str, str]]
) -> None:
    found, absent = loaded
    if "is not installed" in absent.get(name, ""):
        pytest.skip(absent[name])
    assert name in found, absent
    check_all_methods(found[name], T)


def test_what_is_not_installed_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    found, absent = packages.load()
    assert found == ()
    assert absent.keys() == packages.PEERS.keys()
    assert absent["JoeyNMT"] == "joeynmt is not installed (make peers)"


def test_what_cannot_be_imported_is_reported_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> Implementation:
        raise ImportError("no module named this")

    monkeypatch.setattr(packages, "PEERS", {"Broken": ("json", build)})
    assert packages.load() == ((), {"Broken": "json cannot be imported: no module named this"})


def test_a_module_is_imported_without_the_rest_of_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "whole_of_it" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("raise AssertionError\n")
    (inner / "sizes.py").write_text("size = 3\n")
    (inner / "layer.py").write_text("from not_there import anything\nfrom whole_of_it.inner.sizes import size\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules), list(sys.meta_path)
    assert packages._import("whole_of_it.inner.layer", unused=("not_there",)).size == 3
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        packages._import("whole_of_it.inner.layer")
    assert (set(sys.modules), sys.meta_path) == before
