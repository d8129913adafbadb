"""Where the kernels stand, as the tables of docs/performance.md: `python -m benchmarks.standing [TABLE ...]`.

The tables are made of recorded files alone: those of `MACHINES` below, which are benchmarks/results/NAME.json and, for
the date, the first line of NAME.txt. After a new record, put its name there, and

    python -m benchmarks.standing --write docs/performance.md

writes each table anew between the lines `<!-- benchmarks.standing TABLE -->` and `<!-- end -->` of that file.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.grid import Cell
from benchmarks.implementations import COMPILED, DIRECTIONS, EAGER, METHODS, OPS, SDPA
from benchmarks.report import Finding, NotARecordError, Row, read, rows_of, settings_of, weakest_first
from benchmarks.shapes import GRID, Shape
from benchmarks.timing import Ratio

RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "backward")
INITIALS = {EAGER.name: "e", SDPA.name: "s", COMPILED.name: "c"}


@dataclass(frozen=True)
class Machine:
    """A column: the names of its current records."""

    name: str
    targets: str
    decoders: str
    grid: str
    report: str | None = None  # the speed report
    links: tuple[tuple[str, str], ...] = ()  # further records, by what they are


AVX2 = "epyc-zen4-avx2-torch-2.13.0-bf09372-targets"
MACHINES = (
    Machine(
        "Zen 5",
        targets="epyc-zen5-avx512_bf16-torch-2.13.0-740d33f-targets",
        decoders="epyc-zen5-avx512_bf16-torch-2.13.0-0f675df-training-steps",
        grid="epyc-zen5-avx512_bf16-torch-2.13.0-0f675df-grid",
        report="epyc-zen5-avx512_bf16-torch-2.13.0-0f675df-report",
    ),
    Machine(
        "Zen 4",
        targets="epyc-zen4-avx512_bf16-torch-2.13.0-631a3ce-targets",
        decoders="epyc-zen4-avx512_bf16-torch-2.13.0-022e94c-training-steps",
        grid="epyc-zen4-avx512_bf16-torch-2.13.0-29dccf1-grid",
        report="epyc-zen4-avx512_bf16-torch-2.13.0-6c86b86-report",
        links=(("with AVX2", AVX2),),
    ),
    Machine(
        "Xeon with AMX",
        targets="xeon-amx-avx512_amx-torch-2.13.0-64a2fac-targets",
        decoders="xeon-amx-avx512_amx-torch-2.13.0-a004ce7-training-steps",
        grid="xeon-amx-avx512_amx-torch-2.13.0-578bf4c-grid",
    ),
)


def record(name: str) -> dict[str, Any]:
    """The JSON of a record.

    Raises:
        NotARecordError: it cannot be read, or is none of this project's reports.
    """
    return _read(RESULTS / f"{name}.json")


_read = cache(read)


def findings(name: str) -> list[Finding]:
    """Of a run of benchmarks/targets.py.

    Raises:
        NotARecordError: the record has none.
    """
    try:
        found = [
            Finding(**finding | {"shape": Shape(**finding["shape"]), "ratio": Ratio(**finding["ratio"])})
            for each in record(name).get("findings", ())
            if (finding := {key: value for key, value in each.items() if key != "verdict"})
        ]
    except (KeyError, TypeError) as error:
        raise NotARecordError(f"{RESULTS / name}.json has findings of another form: {error}") from None
    if not found:
        raise NotARecordError(f"{RESULTS / name}.json has no findings of benchmarks/targets.py")
    return found


def rates(name: str) -> dict[str, float]:
    """What the machine made at the head of the run, in G a second, by limit.

    Raises:
        NotARecordError: the record has no limits.
    """
    limits = record(name).get("limits")
    if not limits:
        raise NotARecordError(f"{RESULTS / name}.json has no limits of benchmarks/targets.py")
    return {limit: measured["rate"] / 1e9 for limit, measured in limits.items()}


def date_of(name: str) -> str:
    """The day of the run, as the first line of the printed record has it.

    Raises:
        NotARecordError: there is no such line.
    """
    path = RESULTS / f"{name}.txt"
    try:
        first = path.read_text().partition("\n")[0]
    except OSError as error:
        raise NotARecordError(f"{path} cannot be read: {error}") from None
    if not (day := re.search(r"\d{4}-\d\d-\d\d", first)):
        raise NotARecordError(f"{path} does not begin with the command and its date")
    return day.group()


@dataclass(frozen=True)
class Part:
    """Some rows of the targets: those whose measure begins with `measure`, of some kernels and directions, or all."""

    target: int
    measure: str
    kernels: tuple[str, ...] = OPS
    directions: tuple[str, ...] | None = None
    with_weights: bool | None = None
    allocated: bool = False

    def of(self, rows: Sequence[Finding]) -> list[Finding]:
        return [
            row
            for row in rows
            if row.target == self.target
            and row.kernel in self.kernels
            and (self.directions is None or row.direction in self.directions)
            and row.measure.startswith(self.measure)
            and self.with_weights in (None, "no weights" not in row.measure)
            and self.allocated == row.measure.endswith(", as allocated")
        ]


SHARES = {1: "share of the additive", 2: "share of the multiply-add peak", 3: "share of"}
SUMMARY = {
    "additive, many queries: share of its loop": [Part(1, SHARES[1], directions=(each,)) for each in PASSES],
    "dot, many queries: share of the multiply-adds": [Part(2, SHARES[2], ("dot",), (each,)) for each in PASSES],
    "general, many queries: the same": [Part(2, SHARES[2], ("general",), (each,)) for each in PASSES],
    "dot, one query: share of the memory's pace": [Part(3, SHARES[3], ("dot",), (each,)) for each in PASSES],
    "general, one query: the same": [Part(3, SHARES[3], ("general",), (each,)) for each in PASSES],
    "additive, one query: the same": [Part(3, SHARES[3], ("additive",), (each,)) for each in PASSES],
    "additive, many queries, over torch.compile": [
        Part(1, "speed-up over compiled", directions=(each,)) for each in DIRECTIONS
    ],
    "additive, many queries, over eager": [Part(1, "speed-up over eager", directions=DIRECTIONS[1:])],
    "dot and general, many queries, over the best peer": [
        Part(2, "speed-up", directions=(each,)) for each in DIRECTIONS
    ],
    "one query over the best peer": [Part(3, "speed-up", directions=(each,)) for each in DIRECTIONS],
    "bfloat16 over fused float32": [Part(6, "bfloat16: speed-up over fused")],
    "bfloat16 over eager bfloat16": [Part(6, "bfloat16: speed-up over eager")],
    "float16 over fused float32": [Part(6, "float16: speed-up over fused")],
    "float16 over eager float16": [Part(6, "float16: speed-up over eager")],
    "a decoder's training step over one without attention": [Part(4, "fused", METHODS)],
}


def machines() -> Iterator[str]:
    """What each machine gives, and where its records are."""
    yield "| machine | multiply-adds; `torch.mm` | read; copy | commit, date | records |"
    yield "|---|---|---|---|---|"
    for machine in MACHINES:
        of = rates(machine.targets)
        links = [
            ("targets", machine.targets),
            ("decoders", machine.decoders),
            ("report", machine.report),
            ("grid", machine.grid),
            *machine.links,
        ]
        cells = [
            machine.name,
            f"{of['multiply-add']:.0f}; {of['gemm']:.0f} GFLOP/s",
            f"{of['read']:.0f}; {of['copy']:.0f} GB/s",
            f"{settings_of(record(machine.targets))['commit']}, {date_of(machine.targets)}",
            ", ".join(f"[{text}](../benchmarks/results/{name}.txt)" for text, name in links if name),
        ]
        yield _row(cells)


def summary() -> Iterator[str]:
    """A line for each kind of rows: the range of its values, and how many reach what is wanted."""
    of_machines = [[*findings(each.targets), *findings(each.decoders)] for each in MACHINES]
    yield from _summary([machine.name for machine in MACHINES], of_machines)


def avx2() -> Iterator[str]:
    """The same of the run with AVX2 alone."""
    yield from _summary(["Zen 4 with AVX2"], [findings(AVX2)])


def _summary(names: Sequence[str], of_machines: Sequence[Sequence[Finding]]) -> Iterator[str]:
    yield _row(["range by shape: reached of so many rows", "wanted", *names])
    yield _rule(2 + len(names))
    for title, parts in SUMMARY.items():
        of_parts = [[part.of(rows) for part in parts] for rows in of_machines]
        if not any(map(any, of_parts)):
            continue
        # By direction, since forward and backward may have wishes of their own.
        wanted = [_wanted([row for found in of_parts for row in found[i]]) for i in range(len(parts))]
        cells = [_ranges(found) if all(found) else "" for found in of_parts]
        yield _row([title, ", ".join(dict.fromkeys(wanted)) + _sign(of_parts[0][0][0].unit), *cells])
    totals = [_reached([row for row in rows if row.target != 4]) for rows in of_machines]
    yield _row(["all rows but the decoders'", "", *totals])


def _ranges(parts: Sequence[Sequence[Finding]]) -> str:
    texts = []
    for rows in parts:
        least, most = min(row.ratio.value for row in rows), max(row.ratio.value for row in rows)
        texts.append(" to ".join(dict.fromkeys(_number(each, rows[0].unit) for each in (least, most))))
    return f"{', '.join(texts)}{_sign(parts[0][0].unit)}: {_reached([row for rows in parts for row in rows])}"


def _reached(rows: Sequence[Finding]) -> str:
    verdicts = [row.verdict for row in rows if row.verdict]
    return f"{verdicts.count('reached')} of {len(verdicts)}"


def _wanted(rows: Sequence[Finding]) -> str:
    values = sorted({row.wanted for row in rows if row.wanted is not None})
    texts = [f"{100 * each:.0f}" if rows[0].unit == "%" else f"{each:g}x" for each in values]
    return f"{'at most ' if rows[0].at_most else ''}{' or '.join(texts)}"


def additive() -> Iterator[str]:
    """Additive scores of many queries: the share of the loop; torch.compile's time over ours; eager's."""
    measures = {SHARES[1]: PASSES, "speed-up over compiled": DIRECTIONS, "speed-up over eager": DIRECTIONS}
    yield from _by_shape(
        "(B,T,S,A)",
        [[Part(1, measure, directions=(each,)) for each in of_it] for measure, of_it in measures.items()],
    )


def dot() -> Iterator[str]:
    """Dot products of many queries: the share of the peak; the best peer's time. In brackets without the weights."""
    yield from _many_queries("dot")


def general() -> Iterator[str]:
    """The same of general."""
    yield from _many_queries("general")


def _many_queries(method: str) -> Iterator[str]:
    yield from _by_shape(
        "(B,T,S,D)",
        [
            [Part(2, measure, (method,), (each,), kept) for kept in (True, False) for each in of_it]
            for measure, of_it in ((SHARES[2], PASSES), ("speed-up", DIRECTIONS))
        ],
    )


def one_query() -> Iterator[str]:
    """One query of a memory that no cache holds: the share of the memory's pace; the best peer's time over ours.

    And as PyTorch allocates, the backward's rate over that of torch.clone.
    """
    yield _row(["kernel", "(B,T,S,D)", *(machine.name for machine in MACHINES)])
    yield _rule(2 + len(MACHINES))
    for method in OPS:
        parts = [
            [Part(3, measure, (method,), (each,)) for each in of_it]
            for measure, of_it in ((SHARES[3], PASSES), ("speed-up", DIRECTIONS))
        ]
        parts.append([Part(3, "share of torch.clone", (method,), allocated=True)])
        yield from (_row([method, *cells]) for cells in _shapes_and_cells(parts))


def decoders() -> Iterator[str]:
    """A training step over that of the same decoder without attention, by method: fused, and eager in brackets."""
    names = []
    for machine in MACHINES:
        pace = [rates(name)["multiply-add"] for name in (machine.decoders, machine.targets)]
        names.append(f"{machine.name} ({pace[0]:.0f}; {pace[1]:.0f} GFLOP/s)")
    yield _row(["decoder, (B,T,S,H)", *names, "wanted"])
    yield _rule(2 + len(MACHINES))
    of_machines = [findings(machine.decoders) for machine in MACHINES]
    for kind, shape in dict.fromkeys(
        (row.direction, row.shape) for row in Part(4, "fused", METHODS).of(of_machines[0])
    ):
        parts = {name: [Part(4, name, (method,), (kind,)) for method in METHODS] for name in ("fused", "eager")}
        cells = []
        for rows in of_machines:
            fused, eager = (_each(of_it, [row for row in rows if row.shape == shape]) for of_it in parts.values())
            pairs = zip(fused, eager, strict=True)
            cells.append(", ".join(f"{ours.ratio.value:.2f} ({other.ratio.value:.2f})" for ours, other in pairs))
        yield _row([f"{kind} {shape.label}", *cells, ", ".join(f"{row.wanted:.2f}" for row in fused)])


def halves() -> Iterator[str]:
    """bfloat16, and below it float16, over fused float32; in brackets over eager code in the same type."""
    yield _row(["kernel", "(B,T,S,D)", *(machine.name for machine in MACHINES)])
    yield _rule(2 + len(MACHINES))
    ways = [
        [(f"{dtype}: speed-up over {peer}", each) for peer in ("fused", "eager") for each in DIRECTIONS]
        for dtype in ("bfloat16", "float16")
    ]
    for method in OPS:
        parts = [[Part(6, measure, (method,), (each,)) for measure, each in way] for way in ways]
        yield from (_row([method, *cells]) for cells in _shapes_and_cells(parts))


def speed_report() -> Iterator[str]:
    """How many rows of the speed report are ahead of every peer, and the weakest of each method."""
    yield _row(["", "ahead", *(f"weakest of {method}" for method in METHODS)])
    yield _rule(2 + len(METHODS))
    for machine in MACHINES:
        if machine.report is None:
            continue
        rows = weakest_first(rows_of(record(machine.report)))
        if not rows:
            raise NotARecordError(f"{RESULTS / machine.report}.json has no row of the speed report with a peer in it")
        ahead = sum(row.closest[1].value >= 1 for row in rows)
        weakest = [next(row for row in rows if row.method == method) for method in METHODS]
        yield _row([machine.name, f"{ahead} of {len(rows)}", *map(_weakest, weakest)])


def _weakest(row: Row) -> str:
    peer, ratio = row.closest
    decoder = "decoder " if row.mode == "decoder" else ""
    return f"{ratio.value:.2f}x {peer}, {decoder}{row.shape.label} {_direction(row.direction)}"


def grid() -> Iterator[str]:
    """How many cells of the grid are lost, the geometric means over the closest peer, and the worst that is lost."""
    yield _row(["", "commit", "cells with a peer", "lost", "behind, within the spread", *OPS, "the worst lost"])
    yield _rule(6 + len(OPS))
    for machine in MACHINES:
        document = record(machine.grid)
        raced = [cell for cell in map(Cell.from_json, document.get("grid", ())) if cell.worst]
        if not raced:
            raise NotARecordError(f"{RESULTS / machine.grid}.json has no cell of the grid with a peer in it")
        lost = sum(cell.is_lost for cell in raced)
        behind = sum(cell.worst[1].value < 1 for cell in raced) - lost
        cells = [
            machine.name,
            settings_of(document)["commit"].rstrip("+"),
            f"{len(raced)} of {len(GRID) * len(OPS) * len(DIRECTIONS)}",
            str(lost),
            str(behind),
        ]
        for method in OPS:
            mean = statistics.geometric_mean(cell.worst[1].value for cell in raced if cell.method == method)
            cells.append(f"{mean:#.3g}x")
        yield _row([*cells, _worst_loss(raced)])


def _worst_loss(cells: Sequence[Cell]) -> str:
    """To a peer that wins beyond the spread."""
    losses = [
        (ratio.value, cell, peer)
        for cell in cells
        for peer, ratio in cell.ratios.items()
        if ratio.value < 1 and ratio.high < 1
    ]
    if not losses:
        return "none"
    value, cell, peer = min(losses, key=lambda loss: loss[0])
    shape = Shape("", cell.B, cell.T, cell.S, cell.D)
    return f"{cell.method} {shape.label} {_direction(cell.direction)}, {value:.2f}x {peer}"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "machines": machines,
    "summary": summary,
    "dot": dot,
    "general": general,
    "one-query": one_query,
    "additive": additive,
    "halves": halves,
    "avx2": avx2,
    "decoders": decoders,
    "report": speed_report,
    "grid": grid,
}
BLOCK = re.compile(r"(<!-- benchmarks\.standing (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rewritten(text: str) -> str:
    """`text` with every table as the records have it.

    Raises:
        NotARecordError: it has no such table, one of an unknown name or one without an end.
    """

    def block(found: re.Match[str]) -> str:
        begin, name, body, end = found.groups()
        if name not in TABLES:
            raise NotARecordError(f"there is no table {name}; there are {', '.join(TABLES)}")
        if "<!-- benchmarks.standing" in body:
            raise NotARecordError(f"table {name} has no end")
        return begin + "\n".join([*TABLES[name](), end])

    new, count = BLOCK.subn(block, text)
    if count != text.count("<!-- benchmarks.standing") or not count:
        raise NotARecordError("it has no table, or one without an end")
    return new


def _by_shape(head: str, ways: Sequence[Sequence[Part]]) -> Iterator[str]:
    """A row for each shape; in a cell, a line for each of `ways`."""
    yield _row([head, *(machine.name for machine in MACHINES)])
    yield _rule(1 + len(MACHINES))
    yield from map(_row, _shapes_and_cells(ways))


def _shapes_and_cells(ways: Sequence[Sequence[Part]]) -> Iterator[list[str]]:
    of_machines = [findings(machine.targets) for machine in MACHINES]
    shapes = dict.fromkeys(row.shape for row in ways[0][0].of(of_machines[0]))
    if not shapes:
        raise NotARecordError(f"{RESULTS / MACHINES[0].targets}.json has no rows for {ways[0][0]}")
    for shape in shapes:
        cells = []
        for rows in of_machines:
            of_shape = [row for row in rows if row.shape == shape]
            cells.append("<br>".join(_numbers(_each(parts, of_shape)) for parts in ways))
        yield [shape.label, *cells]


def _each(parts: Sequence[Part], rows: Sequence[Finding]) -> list[Finding]:
    """The one row of each part."""
    found = [part.of(rows) for part in parts]
    for part, of_part in zip(parts, found, strict=True):
        if len(of_part) != 1:
            raise NotARecordError(f"a record has {len(of_part)} rows for {part}, where one is expected")
    return [row for (row,) in found]


def _numbers(rows: Sequence[Finding]) -> str:
    """Their values and the best peers' initials; what is beyond two of them in brackets."""
    texts = [_number(row.ratio.value, row.unit) + _initial(row) for row in rows]
    if len(texts) == 4:
        texts = [texts[0], f"{texts[1]} ({texts[2]}", f"{texts[3]})"]
    return ", ".join(texts) + _sign(rows[0].unit) + (" of clone" if "torch.clone" in rows[0].measure else "")


def _initial(row: Finding) -> str:
    peer = row.measure.removeprefix("speed-up over ").removesuffix(", no weights")
    return f" {INITIALS[peer]}" if peer in INITIALS else ""


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _sign(unit: str) -> str:
    return {"%": " %", "x": ""}[unit]


def _direction(name: str) -> str:
    return "with the backward" if name == DIRECTIONS[1] else name


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; all where none is named")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables that stand in FILE anew")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tables if name not in TABLES]:
        parser.error(f"there is no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    try:
        if arguments.write:
            arguments.write.write_text(rewritten(arguments.write.read_text()))
            return
        for name in arguments.tables or TABLES:
            print(f"{name}\n")
            for line in TABLES[name]():
                print(line)
            print()
    except (NotARecordError, OSError) as error:
        sys.exit(f"{arguments.write or 'the tables'} cannot be made: {error}")


if __name__ == "__main__":
    main()
