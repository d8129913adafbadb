"""Two runs of the same report, row by row: `python -m benchmarks.compare OLD NEW`.

OLD and NEW are JSON files of `python -m benchmarks.targets --json` or `python -m pytest --benchmark --benchmark-json`.
What is compared are the rows' ratios, to a limit or a peer that was timed in the same rounds: times drift with the
machine. A row is faster or slower only where its ratio changed by more than both runs' quartiles are apart, together
with a tolerance for what differs from one process to the next. The exit status is 1 where a row is slower.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.grid import Cell
from benchmarks.report import rows_of, settings_of
from benchmarks.timing import Ratio

TOLERANCE = 0.1
VERDICTS = ("slower", "faster", "same", "timed once")


class NotComparableError(ValueError):
    """The files are not two runs of the same report."""


@dataclass(frozen=True)
class Change:
    """One row of both runs. `gain` is the factor by which it got better."""

    row: str
    old: Ratio
    new: Ratio
    at_most: bool = False  # the smaller the better

    @property
    def gain(self) -> float:
        return self.old.value / self.new.value if self.at_most else self.new.value / self.old.value

    def verdict(self, tolerance: float) -> str:
        """One of `VERDICTS`."""
        if any(ratio.low == ratio.value == ratio.high for ratio in (self.old, self.new)):
            return "timed once"  # nothing is known of its spread
        spread = sum(math.log(ratio.high / ratio.low) for ratio in (self.old, self.new))
        change = math.log(self.gain)
        if abs(change) <= math.log1p(tolerance) + spread:
            return "same"
        return "faster" if change > 0 else "slower"

    def line(self, tolerance: float) -> str:
        texts = [f"{ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g})" for ratio in (self.old, self.new)]
        return f"  {self.row:<100}{texts[0]:<24}{texts[1]:<24}{self.gain:>6.2f}x  {self.verdict(tolerance)}"


def rows(document: dict[str, Any]) -> Iterator[tuple[str, Ratio, bool]]:
    """What is measured, its ratio, and whether the smaller is the better.

    Raises:
        NotComparableError: the document is none of this project's reports.
    """
    if not settings_of(document):
        raise NotComparableError("it has none of the settings that benchmarks/report.py writes")
    for finding in document.get("findings", ()):
        # An error has no spread, and a lost cell of the grid stands there once more.
        if finding["unit"] != "e" and finding["target"] != 5 and all(finding["ratio"].values()):
            sizes = tuple(finding["shape"][name] for name in "BTSH")
            name = f"{finding['target']} {finding['kernel']} {sizes} {finding['direction']} {finding['measure']}"
            yield name, Ratio(**finding["ratio"]), finding["at_most"]
    for cell in map(Cell.from_json, document.get("grid", ())):
        for peer, ratio in cell.ratios.items():
            yield f"5 {cell} against {peer}", ratio, False
    for row in rows_of(document):
        for peer, ratio in row.ratios.items():
            yield f"{row.name} against {peer}", ratio, False
        if row.share:
            yield f"{row.name}, share of its limit", row.share, False


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The rows that both have, in the order of the new one.

    Raises:
        NotComparableError: they have none in common.
    """
    before = {name: ratio for name, ratio, _ in rows(old)}
    found = [Change(name, before[name], ratio, at_most) for name, ratio, at_most in rows(new) if name in before]
    if not found:
        raise NotComparableError("they have no row in common")
    return found


def lines(old: dict[str, Any], new: dict[str, Any], tolerance: float, everything: bool = False) -> Iterator[str]:
    """What differs in the settings, the rows that changed (or all), the count of verdicts and the mean gain."""
    for name in settings_of(old) | settings_of(new):
        texts = [settings_of(document).get(name, "unknown") for document in (old, new)]
        if texts[0] != texts[1]:
            yield f"{name:<10}{texts[0]}  ->  {texts[1]}"
    found = changes(old, new)
    for change in found:
        if everything or change.verdict(tolerance) in ("slower", "faster"):
            yield change.line(tolerance)
    counts = Counter(change.verdict(tolerance) for change in found)
    mean = statistics.geometric_mean(change.gain for change in found)
    yield ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS) + f"; geometric mean of all {mean:.3f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="T", help=f"{TOLERANCE:g} is the default")
    parser.add_argument("--all", action="store_true", help="print the rows that stayed the same, too")
    arguments = parser.parse_args()
    documents = []
    for path in (arguments.old, arguments.new):
        try:
            documents.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            sys.exit(f"{path} cannot be read: {error}")
    try:
        for line in lines(*documents, arguments.tolerance, arguments.all):
            print(line)
    except NotComparableError as error:
        sys.exit(f"{arguments.old} and {arguments.new} cannot be compared: {error}")
    sys.exit(any(change.verdict(arguments.tolerance) == "slower" for change in changes(*documents)))


if __name__ == "__main__":
    main()
