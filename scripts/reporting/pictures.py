"""Pictures of the records under results/; the same records give the same bytes."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # which, without pyplot, needs no display
from matplotlib.lines import Line2D

from scripts.reporting.tables import Results, Values, model_rows, number
from utils.common.files import atomic_write

# Okabe and Ito's, told apart by the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# QAT, the fourth, often lies on PTQ per channel: a cross shows within the square.
MARKERS = ("o", "^", "s", "x", "D", "v", "*", "h", "P", "<", ">", "p", "d", "8", "X", "H")
LINES = ("-", "--", ":", "-.")
ACCURACY_TICKS_PCT = (10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 92, 94, 96, 97, 98, 99)
SIZE_TICKS_MB = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
SMALLEST_ERROR_PCT = 0.01
TITLES = {
    "train.py": "training",
    "prune.py": "recovery after pruning",
    "quantization_aware_training.py": "quantization-aware training",
}
"""By the script whose records have a history."""

Curve = list[tuple[int, float]]
"""Epoch and accuracy on val in percent."""


def draw_accuracy_against_size(results: Results, path: Path) -> bool:
    """Draw the models of the results table: the colour says which weights, the shape which form.

    Returns:
        Whether any of them was measured here, so that there was something to draw.
    """
    rows, _ = model_rows(results)
    if all(row["group"] == "published" for row in rows):
        return False
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axis = figure.subplots()
    colors = dict(zip(dict.fromkeys(_weights_of(row) for row in rows), cycle(COLORS), strict=False))
    markers = dict(zip(dict.fromkeys(row["form"] for row in rows), cycle(MARKERS), strict=False))
    for row in rows:
        axis.plot(
            row["file_size_mb"], row["accuracy_pct"], marker=markers[row["form"]], markersize=10,
            color=colors[_weights_of(row)], markerfacecolor="none", markeredgewidth=1.8,
        )  # fmt: skip
    _scale_by_errors(axis, [row["accuracy_pct"] for row in rows])
    axis.set_xscale("log")
    _set_ticks(axis.xaxis, SIZE_TICKS_MB)
    axis.set(xlabel="size of the file, MB", ylabel="accuracy on test, %")
    axis.grid(alpha=0.3)
    weights = [Line2D([], [], linewidth=6, color=color, label=name) for name, color in colors.items()]
    forms = [
        Line2D([], [], marker=marker, linestyle="", color="0.3", markerfacecolor="none", label=name)
        for name, marker in markers.items()
    ]
    figure.legend(handles=weights, loc="outside upper center", ncols=2, frameon=False)
    figure.legend(handles=forms, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)
    return True


def _weights_of(row: Values) -> str:
    return f"{row['group']}, {row['weights']}"


def draw_training_curves(results: Results, path: Path) -> bool:
    """Draw accuracy on val by epoch of every record with a history; returns as above."""
    panels = training_curves(results)
    if not panels:
        return False
    figure = Figure(figsize=(10, 4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            epochs, accuracies_pct = zip(*curve, strict=True)
            axis.plot(
                epochs, accuracies_pct, marker=".", linewidth=1.3, color=COLORS[index % len(COLORS)],
                linestyle=LINES[index // len(COLORS) % len(LINES)],
                label=f"{name}, best {max(accuracies_pct):.2f} %",
            )  # fmt: skip
        _scale_by_errors(axis, [accuracy_pct for curve in curves.values() for _, accuracy_pct in curve])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=title, xlabel="epoch", ylabel="accuracy on val, %")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    _save(figure, path)
    return True


def training_curves(results: Results) -> dict[str, dict[str, Curve]]:
    """Return the curves by record, in a panel per script."""
    found = {name: curve for name, curve in results.read_all("*", _curve).items() if curve}
    panels = {
        title: {name: curve for name, (by, curve) in found.items() if by == script}
        for script, title in TITLES.items()
    }
    return {title: curves for title, curves in panels.items() if curves}


def _curve(content: Any) -> tuple[str, Curve] | None:
    """Return the script and what it recorded, if that is accuracies on val of more than one epoch."""
    measured = content.get("results", {})
    if "history" not in measured:
        return None
    curve = [
        (int(number(row["epoch"])), number(row["val_accuracy_pct"]))
        for row in measured["history"]
        if row["val_accuracy_pct"] is not None
    ]
    return (Path(content["command"].split()[1]).name, curve) if len(curve) > 1 else None


PICTURES: dict[str, Callable[[Results, Path], bool]] = {
    "accuracy_against_size.png": draw_accuracy_against_size,
    "training_curves.png": draw_training_curves,
}


def _scale_by_errors(axis, accuracies_pct: Sequence[float]) -> None:
    """Give half the errors the same height everywhere, so that good models do not lie on one line."""
    axis.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(100 - accuracy, SMALLEST_ERROR_PCT)),
            lambda height: 100 - 10.0**-height,
        ),
    )
    lowest_error = max(100 - max(accuracies_pct), SMALLEST_ERROR_PCT)
    axis.set_ylim(100 - 1.1 * (100 - min(accuracies_pct)), 100 - lowest_error / 1.1)
    _set_ticks(axis.yaxis, ACCURACY_TICKS_PCT)


def _set_ticks(axis, ticks: Sequence[float]) -> None:
    """Mark those of the ticks that the axis shows; matplotlib's own stay where they are fewer than three."""
    low, high = axis.get_view_interval()
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > 2:
        axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
        axis.set_ticks([], minor=True)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
