"""The speed report as a Markdown table, the weakest row first: `python -m benchmarks.table report.json`.

The file is what `python -m pytest --benchmark --benchmark-json report.json` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.implementations import DIRECTIONS
from benchmarks.report import Row, rows_of

HEAD = ("", "(B,T,S,H)", *(f"{each}: {what}" for each in DIRECTIONS for what in ("closest peer", "of its limit")))


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """A row for each method and shape, both directions in it."""
    pairs: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row.mode, row.method, row.shape), {})[row.direction] = row
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + "---|" * len(HEAD)
    for pair in sorted(pairs.values(), key=lambda pair: min(row.closest[1].value for row in pair.values())):
        some = next(iter(pair.values()))
        cells = [f"{some.method}, {some.shape.use}", f"({','.join(map(str, some.shape.sizes))})"]
        for direction in DIRECTIONS:
            cells += _cells(pair[direction]) if direction in pair else ["", ""]
        yield f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    peer, ratio = row.closest
    share = f"{row.share.value:.0%} ({row.bound})" if row.share else ""
    return [f"{ratio.value:.2f}x {peer}", share]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    rows = rows_of(json.loads(arguments.report.read_text()))
    if not rows:
        sys.exit(f"{arguments.report} has no row of the speed report")
    for line in lines(rows):
        print(line)


if __name__ == "__main__":
    main()
