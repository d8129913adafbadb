"""No kernel takes more instructions than were recorded for it: a slow-down found without a clock."""

from __future__ import annotations

import pytest

from tests.instructions import CAPABILITIES, HOW_TO_RECORD, NotCountableError, complaints, count, read_record


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_as_many_as_recorded(capability: str) -> None:
    try:
        compiler, counted = count(capability)
    except NotCountableError as error:
        pytest.skip(str(error))
    recorded = read_record().get(compiler, {}).get(capability)
    if recorded is None:
        pytest.skip(f"nothing is recorded for {compiler} and {capability}; {HOW_TO_RECORD}")
    found = complaints(counted, recorded)
    assert not found, "\n".join((f"{compiler}, {capability}:", *found, HOW_TO_RECORD))


@pytest.mark.parametrize(
    ("counted", "complaint"),
    [
        (1000, None),
        (1030, None),
        (900, None),
        (1031, "call: 1031 instructions, 1000 recorded, 1.031x"),
        (899, "call: 899 instructions, 1000 recorded, 0.899x: record it, or nothing will notice when it is lost"),
    ],
)
def test_both_bounds(counted: int, complaint: str | None) -> None:
    assert complaints({"call": counted}, {"call": 1000}) == ([] if complaint is None else [complaint])


def test_calls_that_came_or_went() -> None:
    """A renamed call would otherwise be held against nothing."""
    found = complaints({"new": 1, "same": 1}, {"old": 1, "same": 1})
    assert found == ["new: not recorded", "old: recorded, but not counted"]
