"""Pictures of the records under results/; the same records give the same bytes."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.reporting.report_records import Results, number
from scripts.reporting.results_table import OURS, PUBLISHED, Row, Table
from utils.common.errors import UserError
from utils.common.files import atomic_write
from utils.pruning.plots import plot_sensitivity
from utils.pruning.scanning_log import read_measurements, read_recommended

# Okabe & Ito's, told apart by the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# QAT, the fifth, often lies on PTQ per channel: a cross shows within the diamond.
MARKERS = ("o", "^", "s", "D", "x", "v", "*", "h", "P", "<", ">", "p", "d", "8", "X", "H")
LINES = ("-", "--", ":", "-.")
ACCURACY_TICKS_PCT = (
    (10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 92, 94, 96, 97, 98, 99),
    tuple(range(1, 100)),
    tuple(half / 2 for half in range(1, 200)),
    tuple(tenth / 10 for tenth in range(1, 1000)),
)
"""From wide to narrow: the first of them that has enough ticks is taken."""
ENOUGH_TICKS = 3
SIZE_TICKS_MB = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
SMALLEST_ERROR_PCT = 0.01
TITLES = {
    "train.py": "training",
    "prune.py": "recovery after pruning",
    "quantization_aware_training.py": "quantization-aware training",
}

Curve = list[tuple[int, float]]
"""Epoch and accuracy on val in percent."""


def draw_accuracy_against_size(results: Results, path: Path) -> bool:
    """Draw the rows of the results table whose size is known, if any of them was measured here.

    Returns:
        Whether there was something to draw.

    Raises:
        UserError: a record is none, or the picture cannot be written.
    """
    rows = [row for row in Table(results).rows if row.file_mb is not None]
    if all(row.group == PUBLISHED for row in rows):
        return False
    plot_accuracy_against_size(path, rows)
    return True


def draw_training_curves(results: Results, path: Path) -> bool:
    """Draw the accuracy on val by epoch of every record with a history; returns and raises as above."""
    panels = training_curves(results)
    if panels:
        plot_training_curves(path, panels)
    return bool(panels)


def draw_sensitivity(results: Results, path: Path) -> bool:
    """Draw scanning_log.csv as the scan does, with the threshold of scan.json; as above."""
    log = results.folder / "scanning_log.csv"
    scan = results.take(
        "scan",
        lambda record: (
            number(record["results"]["dense_accuracy_pct"]),
            number(record["arguments"]["accuracy_threshold"]),
        ),
    )
    if scan is None or not log.exists():
        return False
    _, descriptions = read_recommended(log)
    try:
        shapes = {name: tuple(map(int, shape.split("x"))) for name, (shape, *_) in descriptions.items()}
    except ValueError as error:
        raise UserError(f"{log} has a shape that is not like 32x3x3x3 ({error}): scan again") from error
    plot_sensitivity(path, read_measurements(log, descriptions), shapes, *scan)
    return True


PICTURES: dict[str, Callable[[Results, Path], bool]] = {
    "accuracy_against_size.png": draw_accuracy_against_size,
    "training_curves.png": draw_training_curves,
    "scanning_log.png": draw_sensitivity,
}


def training_curves(results: Results) -> dict[str, dict[str, Curve]]:
    """The curves by record, in panels by script and folder.

    Raises:
        UserError: a file under results/ is no JSON, or its history is none.
    """
    panels: dict[tuple[str, str], dict[str, Curve]] = {}
    for name in results.names("**/*"):
        found = results.need(name, _curve)
        if found is not None:
            folder, _, record = name.rpartition("/")
            panels.setdefault((folder, found[0]), {})[record] = found[1]
    known = list(TITLES)
    in_order = sorted(
        panels, key=lambda key: (key[0], known.index(key[1]) if key[1] in known else len(known))
    )
    return {
        TITLES.get(script, script) + (f" ({folder})" if folder else ""): panels[folder, script]
        for folder, script in in_order
    }


def _curve(content: Any) -> tuple[str, Curve] | None:
    """The script and what it recorded, if it recorded accuracies on val of more than one epoch."""
    measured = content.get("results") if isinstance(content, dict) else None
    if not isinstance(measured, dict) or "history" not in measured:
        return None
    curve = [
        (int(number(row["epoch"])), number(row["val_accuracy_pct"]))
        for row in measured["history"]
        if row["val_accuracy_pct"] is not None
    ]
    return (Path(content["command"].split()[1]).name, curve) if len(curve) > 1 else None


def plot_accuracy_against_size(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Accuracy on test against the size of the file, as a PNG; colour says which weights, shape which form.

    Args:
        path: of the PNG.
        rows: with `file_mb`.

    Raises:
        UserError: the file cannot be written.
    """
    # A Figure without pyplot needs no display and leaves nothing global behind.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axis = figure.subplots()
    colors = _assign(map(_weights_of, rows), COLORS)
    markers = _assign((row.form for row in rows), MARKERS)
    for row in rows:
        axis.errorbar(
            row.file_mb, row.accuracy_pct, yerr=row.spread_pct, marker=markers[row.form], markersize=10,
            color=colors[_weights_of(row)], markerfacecolor="none", markeredgewidth=1.8, linestyle="",
        )  # fmt: skip
    _scale_by_errors(axis, [row.accuracy_pct for row in rows])
    sizes = [row.file_mb for row in rows]
    axis.set_xscale("log")
    axis.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    shown = [size for size in SIZE_TICKS_MB if axis.get_xlim()[0] <= size <= axis.get_xlim()[1]]
    axis.set_xticks(shown, [f"{size:g}" for size in shown])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.set_xlabel("size of the file, MB")
    axis.set_ylabel("accuracy on test, %")
    weights = [Line2D([], [], linewidth=6, color=c, label=name) for name, c in colors.items()]
    forms = [
        Line2D([], [], marker=m, linestyle="", color="0.3", markerfacecolor="none", label=name)
        for name, m in markers.items()
    ]
    figure.legend(handles=weights, loc="outside upper center", ncols=3, frameon=False)
    figure.legend(handles=forms, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_training_curves(path: str | os.PathLike, panels: dict[str, dict[str, Curve]]) -> None:
    """Accuracy on val by epoch, as a PNG.

    Args:
        path: of the PNG.
        panels: curves by name, by the panel's title.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            best = max(accuracy_pct for _, accuracy_pct in curve)
            axis.plot(
                *zip(*curve, strict=True), marker=".", linewidth=1.3, color=COLORS[index % len(COLORS)],
                linestyle=LINES[index // len(COLORS) % len(LINES)], label=f"{name}, best {best:.2f} %",
            )  # fmt: skip
        _scale_by_errors(axis, [accuracy_pct for curve in curves.values() for _, accuracy_pct in curve])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.set_ylabel("accuracy on val, %")
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    _save(figure, path)


def _weights_of(row: Row) -> str:
    return f"ours, {row.pruning or 'dense'}" if row.group == OURS else row.group


def _assign(names: Iterable[str], values: Sequence[str]) -> dict[str, str]:
    """A value for each different name, in order; they start again when they are used up."""
    return {name: values[index % len(values)] for index, name in enumerate(dict.fromkeys(names))}


def _scale_by_errors(axis, accuracies_pct: Sequence[float]) -> None:
    """Halving the errors takes the same height everywhere, so that good models do not lie on one line."""
    highest_error = 100 - min(accuracies_pct)
    lowest_error = max(100 - max(accuracies_pct), SMALLEST_ERROR_PCT)
    axis.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(100 - accuracy, SMALLEST_ERROR_PCT)),
            lambda height: 100 - 10.0**-height,
        ),
    )
    axis.set_ylim(100 - highest_error * 1.1, 100 - lowest_error / 1.1)
    low, high = axis.get_ylim()
    candidates = ([tick for tick in ticks if low <= tick <= high] for ticks in ACCURACY_TICKS_PCT)
    shown = next((ticks for ticks in candidates if len(ticks) >= ENOUGH_TICKS), [])
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_yticks([], minor=True)


def _save(figure, path: str | os.PathLike) -> None:
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
