"""Two runs of the same report, row by row: `python -m benchmarks.compare OLD NEW`.

OLD and NEW are JSON files of `python -m benchmarks.targets --json` or `python -m pytest --benchmark --benchmark-json`.
What is compared are the rows' ratios, to a limit or a peer that was timed in the same rounds: times drift with the
machine. A ratio is better or worse only where it changed by more than both runs' quartiles are apart, together with a
tolerance for what differs from one process to the next; a row is faster or slower where most of its ratios are. The
exit status is 1 where a row is slower. Changes too small for all that show in tests/instructions.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.grid import Cell
from benchmarks.report import NotARecordError, read, rows_of, settings_of
from benchmarks.timing import Ratio

TOLERANCE = 0.25
FEWEST_ROUNDS = 5
VERDICTS = ("slower", "faster", "same", "too few rounds")


class NotComparableError(ValueError):
    """The files are not two runs of the same report."""


@dataclass(frozen=True)
class Pair:
    """A ratio in both runs. `gain` is the factor by which it got better."""

    old: Ratio
    new: Ratio
    at_most: bool = False  # the smaller the better

    @property
    def gain(self) -> float:
        return self.old.value / self.new.value if self.at_most else self.new.value / self.old.value

    def verdict(self, tolerance: float) -> str:
        """One of `VERDICTS`: whether the change is more than the quartiles' and the tolerance's together."""
        for ratio in (self.old, self.new):
            if ratio.low == ratio.high or (ratio.rounds is not None and ratio.rounds < FEWEST_ROUNDS):
                return VERDICTS[3]  # nothing is known of its spread
        spread = sum(math.log(ratio.high / ratio.low) for ratio in (self.old, self.new))
        change = math.log(self.gain)
        if abs(change) <= math.log1p(tolerance) + spread:
            return "same"
        return "faster" if change > 0 else "slower"


@dataclass(frozen=True)
class Change:
    """One row of both runs, by what it was held against."""

    row: str
    pairs: dict[str, Pair]

    @property
    def gain(self) -> float:
        return statistics.median(pair.gain for pair in self.pairs.values())

    def verdict(self, tolerance: float) -> str:
        """What more than half of the pairs say that know of their spread, if all together change as much.

        A single peer may have changed itself.
        """
        counts = Counter(pair.verdict(tolerance) for pair in self.pairs.values())
        known = counts.total() - counts[VERDICTS[3]]
        if not known:
            return VERDICTS[3]
        if abs(math.log(self.gain)) <= math.log1p(tolerance):
            return "same"
        return next((verdict for verdict in ("slower", "faster") if 2 * counts[verdict] > known), "same")

    def line(self, tolerance: float) -> str:
        against, pair = min(self.pairs.items(), key=lambda item: abs(math.log(item[1].gain / self.gain)))
        texts = [f"{ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g})" for ratio in (pair.old, pair.new)]
        name = f"{self.row} {against}"
        return f"  {name:<100}{texts[0]:<24}{texts[1]:<24}{self.gain:>6.2f}x  {self.verdict(tolerance)}"


def rows(document: dict[str, Any]) -> Iterator[tuple[str, str, Ratio, bool]]:
    """What is measured, against what, the ratio, and whether the smaller is the better.

    Raises:
        NotComparableError: the document is none of this project's reports.
    """
    if not settings_of(document):
        raise NotComparableError("it has none of the settings that benchmarks/report.py writes")
    for finding in document.get("findings", ()):
        # An error has no spread, and a lost cell of the grid stands there once more.
        if finding["unit"] != "e" and finding["target"] != 5 and all(finding["ratio"].values()):
            sizes = tuple(finding["shape"][name] for name in "BTSH")
            name = f"{finding['target']} {finding['kernel']} {sizes} {finding['direction']}"
            yield f"{name} {finding['measure']}", "", Ratio(**finding["ratio"]), finding["at_most"]
    for cell in map(Cell.from_json, document.get("grid", ())):
        for peer, ratio in cell.ratios.items():
            yield f"5 {cell}", f"against {peer}", ratio, False
    for row in rows_of(document):
        for peer, ratio in row.ratios.items():
            yield row.name, f"against {peer}", ratio, False
        if row.share:
            yield row.name, "against its limit", row.share, False


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The rows that both have, in the order of the new one.

    Raises:
        NotComparableError: they have none in common.
    """
    before = {(row, against): ratio for row, against, ratio, _ in rows(old)}
    pairs: dict[str, dict[str, Pair]] = {}
    for row, against, ratio, at_most in rows(new):
        if (row, against) in before:
            pairs.setdefault(row, {})[against] = Pair(before[row, against], ratio, at_most)
    if not pairs:
        raise NotComparableError("they have no row in common")
    return [Change(row, of_row) for row, of_row in pairs.items()]


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
            documents.append(read(path))
        except NotARecordError as error:
            sys.exit(str(error))
    try:
        for line in lines(*documents, arguments.tolerance, arguments.all):
            print(line)
    except NotComparableError as error:
        sys.exit(f"{arguments.old} and {arguments.new} cannot be compared: {error}")
    sys.exit(any(change.verdict(arguments.tolerance) == "slower" for change in changes(*documents)))


if __name__ == "__main__":
    main()
