"""Pictures of a run: `python -m benchmarks.plots results.json --out docs/`, each as PNG and SVG.

Of the targets (`python -m benchmarks.targets --json results.json`):
limits    the share of its limit that each kernel reaches, by shape
grid      the fused op's speed-up over its closest peer, by shape
memory    peak memory of additive attention against T = S
resident  resident size over a decoder's training steps

Of the speed report (`python -m pytest --benchmark --benchmark-json results.json`):
speedups  the fused op's speed-up over every peer, by shape
roofline  what it computes in a second, by what it computes for a byte, under the machine's limits
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import bounds
from benchmarks.grid import Cell
from benchmarks.implementations import DIRECTIONS, FUSED, OPS
from benchmarks.report import NotARecordError, Row, read, rows_of, settings_of
from benchmarks.resident_size import STEPS
from benchmarks.shapes import Shape

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"svg.hashsalt": "attn_ext", "svg.fonttype": "none"})  # the same results are the same file


def limits(data: dict[str, Any]) -> Figure | None:
    """A bar for each share of a limit that something is asked of: rows by target, kernel and shape, columns by pass."""
    shares = [each for each in data.get("findings", ()) if each["unit"] == "%" and each["wanted"] is not None]
    if not shares:
        return None
    rows: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for share in shares:
        key = share["target"], share["kernel"], Shape("", *(share["shape"][name] for name in "BTSH")).label
        rows.setdefault(key, {}).setdefault(share["direction"], []).append(share)
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.3 * len(rows)), sharex=True, sharey=True, layout="constrained"
    )
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        for y, bars in enumerate(rows.values()):
            height = 0.8 / max(1, len(bars.get(direction, ())))
            for i, share in enumerate(bars.get(direction, ())):
                _bar(axes, y - 0.4 + height * (i + 0.5), height, share)
        for y, (above, below) in enumerate(pairwise(rows)):
            if above[0] != below[0]:
                axes.axhline(y + 0.5, color=GREY, linewidth=0.8)
        axes.set_title(direction, fontsize=9)
        axes.set_xlabel("% of the limit")
    panels[0].set_yticks(range(len(rows)), [f"{kernel} {sizes}" for _, kernel, sizes in rows], fontsize=7)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    legend = [Patch(color=BLUE, label="reached"), Patch(color=ORANGE, label="missed")]
    legend += [Line2D([], [], color="black", linewidth=2, label="wanted")]
    legend += [Line2D([], [], color="black", linewidth=0.8, label="quartiles")]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8)
    named = {1: "the prototype's loop", 2: "the multiply-add peak (with, without weights)", 3: "the bandwidth"}
    order = ", then ".join(named[target] for target in dict.fromkeys(key[0] for key in rows))
    figure.suptitle(f"Share of the machine's limit: of {order}\n{_where(data)}", fontsize=9)
    return figure


def _bar(axes: Axes, y: float, height: float, share: dict[str, Any]) -> None:
    value, low, high = (100 * share["ratio"][key] for key in ("value", "low", "high"))
    axes.barh(y, value, color=BLUE if share["verdict"] == "reached" else ORANGE, height=0.9 * height)
    axes.plot([low, high], [y, y], color="black", linewidth=0.8)
    axes.plot([100 * share["wanted"]] * 2, [y - 0.5 * height, y + 0.5 * height], color="black", linewidth=2)
    axes.text(1, y, f"{value:.0f}", va="center", color="white", fontsize=12 * height**0.5 - 1.5, fontweight="bold")


def grid(data: dict[str, Any]) -> Figure | None:
    """A square for each shape: rows by T and S, columns by B and D."""
    cells = {cell.key: cell for cell in map(Cell.from_json, data.get("grid", ()))}
    if not cells:
        return None
    B, T, S, D = (sorted({cell.key[i] for cell in cells.values()}) for i in range(1, 5))
    rows, columns = list(product(T, S)), list(product(B, D))
    figure, panels = plt.subplots(
        len(DIRECTIONS),
        len(OPS),
        figsize=(3 + 0.2 * len(OPS) * len(columns), 2 + 0.2 * len(DIRECTIONS) * len(rows)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    # As logarithms, so that half as fast is as far from white as twice; beyond 10 the colour says enough.
    norm, image = TwoSlopeNorm(0, math.log(1 / 4), math.log(10)), None
    for axes, (direction, method) in zip(panels.flat, product(DIRECTIONS, OPS), strict=True):
        values = [[_closest(cells, method, b, t, s, d, direction) for b, d in columns] for t, s in rows]
        axes.set_facecolor("#a0aec0")  # no peer that fits in memory, or not measured
        image = axes.imshow(values, norm=norm, cmap="RdBu", aspect="auto")
        lost = [
            (x, y)
            for (y, (t, s)), (x, (b, d)) in product(enumerate(rows), enumerate(columns))
            if (cell := cells.get((method, b, t, s, d, direction))) and cell.is_lost
        ]
        axes.plot(*zip(*lost, strict=True), "k.", markersize=3) if lost else None
        axes.set_title(f"{method}, {direction}", fontsize=9)
        for position in range(len(D), len(columns), len(D)):
            axes.axvline(position - 0.5, color="white", linewidth=2)
        for position in range(len(S), len(rows), len(S)):
            axes.axhline(position - 0.5, color="white", linewidth=2)
    for axes in panels[-1]:
        axes.set_xticks(range(len(columns)), [f"{b}, {d}" for b, d in columns], rotation=90, fontsize=6)
        axes.set_xlabel("B, D")
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(rows)), [f"{t}, {s}" for t, s in rows], fontsize=6)
        axes.set_ylabel("T, S")
    bar = figure.colorbar(
        image, ax=panels, shrink=0.6, ticks=[math.log(each) for each in (1 / 4, 1 / 2, 1, 2, 5, 10)], extend="both"
    )
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "5", "10"])
    legend = "a dot: lost beyond the spread; grey: no peer fits in memory, or not measured"
    figure.suptitle(f"Speed-up over the closest peer; {legend}\n{_where(data)}", fontsize=9)
    return figure


def memory(data: dict[str, Any]) -> Figure | None:
    """Filled: measured; hollow and dashed: computed."""
    points = data.get("memory", [])
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, colour in (("fused", BLUE), ("eager", ORANGE)):
        of_it = [point for point in points if point["implementation"] == name]
        measured = [(point["sizes"][1], point["measured"] / 1e9) for point in of_it if point["measured"]]
        if measured:
            axes.plot(*zip(*measured, strict=True), "o-", color=colour, label=f"{name}, measured")
        beyond = [(point["sizes"][1], point["computed"] / 1e9) for point in of_it if point["measured"] is None]
        if beyond:
            axes.plot(*zip(*measured[-1:], *beyond, strict=True), "--", color=colour)
            axes.plot(*zip(*beyond, strict=True), "o", color=colour, markerfacecolor="white", label=f"{name}, computed")
            axes.annotate(f"{beyond[-1][1]:.0f} GB", beyond[-1], (0, 7), textcoords="offset points", ha="center")
        elif measured:
            axes.annotate(f"{measured[-1][1]:.2g} GB", measured[-1], (0, 7), textcoords="offset points", ha="center")
    axes.set_yscale("log")
    axes.margins(0.06, 0.1)
    axes.set_xlabel("T = S")
    axes.set_ylabel("GB beyond inputs, outputs and gradients")
    axes.grid(axis="y", color="#e2e8f0")
    axes.legend(frameon=False)
    B, _, _, A = points[0]["sizes"]
    figure.suptitle(f"Peak memory of additive attention, forward + backward, B={B}, A={A}\n{_where(data)}", fontsize=9)
    return figure


def resident(data: dict[str, Any]) -> Figure | None:
    """From 0: PyTorch itself is most of it."""
    curves = data.get("resident", [])
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
    for curve, colour in zip(curves, (BLUE, ORANGE, GREY), strict=False):
        steps = [STEPS * (i + 1) / len(curve["bytes"]) for i in range(len(curve["bytes"]))]
        axes.plot(steps, [size / 1e6 for size in curve["bytes"]], color=colour, label=curve["method"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training steps")
    axes.set_ylabel("resident size, MB")
    axes.grid(axis="y", color="#e2e8f0")
    axes.legend(frameon=False)
    sizes = Shape("", *curves[0]["sizes"]).label
    figure.suptitle(f"Resident size over training steps, (B,T,S,H) = {sizes}\n{_where(data)}", fontsize=9)
    return figure


def speedups(data: dict[str, Any]) -> Figure | None:
    """A panel for each method, a line for each shape and direction, a mark for each peer."""
    rows = rows_of(data)
    if not rows:
        return None
    methods = list(dict.fromkeys(row.method for row in rows))
    peers = sorted({peer for row in rows for peer in row.ratios})
    colours = dict(zip(peers, plt.get_cmap("tab20").colors, strict=False))
    lines = max(sum(row.method == method for row in rows) for method in methods)
    figure, panels = plt.subplots(
        1, len(methods), figsize=(4 + 3 * len(methods), 1.8 + 0.19 * lines), squeeze=False, layout="constrained"
    )
    for axes, method in zip(panels.flat, methods, strict=True):
        of_method = [row for row in rows if row.method == method]
        for y, row in enumerate(of_method):
            axes.axhline(y, color="#e2e8f0", linewidth=0.6, zorder=0)
            for peer, ratio in row.ratios.items():
                axes.plot([ratio.low, ratio.high], [y, y], color=colours[peer], linewidth=1)
                axes.plot(ratio.value, y, "o", color=colours[peer], markersize=4)
        labels = [f"{row.shape.use}{' +' if row.direction != 'forward' else ''}" for row in of_method]
        axes.set_yticks(range(len(of_method)), labels, fontsize=6)
        axes.set_ylim(len(of_method) - 0.5, -0.5)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("the peer's time over the fused op's", fontsize=8)
    marks = [Line2D([], [], color=colours[peer], marker="o", linewidth=0, label=peer) for peer in peers]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 8), frameon=False, fontsize=7)
    figure.suptitle(f"Speed-up over every peer, with quartiles; +: with backward\n{_where(data)}", fontsize=9)
    return figure


def roofline(data: dict[str, Any]) -> Figure | None:
    """Products under the multiply-add peak, tanh terms under the prototype's loop, both under memory's bandwidth."""
    rows = [row for row in rows_of(data) if row.mode == "op"]
    rates: dict[str, list[float]] = {}
    for row in rows:
        for name, rate in row.rates.items():
            rates.setdefault(name, []).append(rate)
    roof = {name: statistics.median(of_rows) for name, of_rows in rates.items()}
    if not {"multiply-add", "additive forward", "read"} <= roof.keys():
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    kinds = (("dot", "general"), "multiply-add", "FLOP"), (("concat",), "additive forward", "tanh terms")
    for axes, (methods, limit, unit) in zip(panels, kinds, strict=True):
        intensities = 0.05, roof[limit] / roof["read"], 2000
        axes.plot(intensities, [min(roof["read"] * each, roof[limit]) / 1e9 for each in intensities], color=GREY)
        for row in rows:
            if row.method in methods:
                work, traffic = _work(row)
                marker = "o" if row.direction == "forward" else "s"
                colour = {"dot": BLUE, "general": ORANGE}.get(row.method, BLUE)
                filled = colour if row.shape.T > 1 else "white"
                rate = work / row.seconds[FUSED.name] / 1e9
                axes.plot(work / traffic, rate, marker, color=colour, markerfacecolor=filled, markersize=5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{unit} a byte of inputs, results and gradients")
        axes.set_ylabel(f"G {unit} a second")
        axes.set_title(", ".join(methods), fontsize=9)
    legend = [Line2D([], [], color=GREY, label="memory's bandwidth, then the limit of the loop")]
    legend += [
        Line2D([], [], color=BLUE, marker=m, linewidth=0, label=d) for m, d in zip("os", DIRECTIONS, strict=True)
    ]
    legend += [Line2D([], [], color=BLUE, marker="o", markerfacecolor="white", linewidth=0, label="one query")]
    legend += [Line2D([], [], color=ORANGE, marker="o", linewidth=0, label="general")]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=7)
    figure.suptitle(f"Roofline (above the slope: in cache)\n{_where(data)}", fontsize=9)
    return figure


def _work(row: Row) -> tuple[float, float]:
    """FLOP of the products, or concat's tanh terms; and bytes of inputs, results and gradients."""
    B, T, S, H = row.shape.sizes
    with_backward = row.direction != "forward"
    # The context and, with backward, its gradient; the gradient of every input.
    traffic = 4.0 * (B * S * H + 2 * B * T * H + B * T * S) * (2 if with_backward else 1)
    if row.method == "concat":
        return (2.0 if with_backward else 1.0) * row.shape.elements, traffic
    work = bounds.projections(row.method, row.shape) + bounds.attention(row.method, row.shape)
    return (3 if with_backward else 1) * work, traffic


PLOTS = {
    "limits": limits,
    "grid": grid,
    "memory": memory,
    "resident": resident,
    "speedups": speedups,
    "roofline": roofline,
}


def _closest(cells: dict[Any, Cell], *key: object) -> float:
    cell = cells.get(key)
    return math.log(cell.worst[1].value) if cell is not None and cell.worst else math.nan


def _where(data: dict[str, Any]) -> str:
    settings = settings_of(data)
    return f"{settings['machine']}\n{settings['software'].split(',')[0]}, commit {settings['commit']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what one of them wrote")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        data = read(arguments.results)
    except NotARecordError as error:
        sys.exit(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        figure = draw(data)
        if figure is None:
            print(f"{name}: {arguments.results} has nothing for it")
            continue
        for ending in ("png", "svg"):
            path = arguments.out / f"{name}.{ending}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if ending == "svg" else None)
            print(path)
        plt.close(figure)


if __name__ == "__main__":
    main()
