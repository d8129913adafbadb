"""The speed report as a Markdown table, the weakest first: `python -m benchmarks.table report.json`.

The file is what `python -m pytest --benchmark --benchmark-json report.json` wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.implementations import DIRECTIONS
from benchmarks.report import NotARecordError, Row, read, rows_of, weakest_first


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The weakest row in words; then a line for each shape, a column for each method, forward and with backward."""
    peer, ratio = (weakest := weakest_first(rows)[0]).closest
    yield (
        f"Weakest: {weakest.method}, {weakest.shape.use}, {weakest.direction}: "
        f"{ratio.value:.2f}x the speed of {peer} ({ratio.low:.2f} to {ratio.high:.2f})."
    )
    methods = list(dict.fromkeys(row.method for row in rows))
    yield ""
    yield f"| use | (B,T,S,H) | {' | '.join(f'{method}: forward, with backward' for method in methods)} |"
    yield "|---|---|" + "---|" * len(methods)
    for shape in dict.fromkeys(row.shape for row in weakest_first(rows)):
        cells = [shape.use, shape.label]
        for method in methods:
            of_cell = {row.direction: row for row in rows if (row.shape, row.method) == (shape, method) and row.ratios}
            cells.append(", ".join(_ratio(of_cell[each]) for each in DIRECTIONS if each in of_cell))
        yield f"| {' | '.join(cells)} |"


def _ratio(row: Row) -> str:
    peer, ratio = row.closest
    return f"{ratio.value:.2f}x {peer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    try:
        rows = rows_of(read(arguments.report))
    except NotARecordError as error:
        sys.exit(str(error))
    if not weakest_first(rows):
        sys.exit(f"{arguments.report} has no row of the speed report with a peer in it")
    for line in lines(rows):
        print(line)


if __name__ == "__main__":
    main()
