"""Pictures of the records under results/; the same records give the same bytes."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # without pyplot it needs no display
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from scripts.reporting.tables import Results, model_rows, number
from utils.common.files import atomic_write

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
# The fourth is QAT's, whose points often lie on those of PTQ per channel: a cross shows inside a square.
MARKERS = ("o", "^", "s", "x", "D", "v", "*", "h", "P", "<", ">", "p", "d", "8", "X", "H")
SMALLEST_ERROR_PCT = 0.01
TITLES = {
    "train.py": "training",
    "prune.py": "recovery after pruning",
    "quantization_aware_training.py": "quantization-aware training",
}
"""Titles of the training curves, by the script that wrote the records."""

Curve = list[tuple[int, float]]
"""Epoch and accuracy on val in percent."""


def draw_accuracy_against_size(results: Results, path: Path) -> bool:
    """Draw the models of the results table: weights by color, formats by marker.

    Returns:
        Whether there was a model of ours to draw.
    """
    rows, _ = model_rows(results)
    if all(row["name"].startswith("published/") for row in rows):
        return False
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(dict.fromkeys(row["weights"] for row in rows), cycle(COLORS), strict=False))
    markers = dict(zip(dict.fromkeys(row["form"] for row in rows), cycle(MARKERS), strict=False))
    hollow: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none"}
    for row in rows:
        axes.plot(
            row["file_size_mb"], _error_pct(row["accuracy_pct"]), **hollow, marker=markers[row["form"]],
            color=colors[row["weights"]], markersize=10, markeredgewidth=1.8,
        )  # fmt: skip
    _show_accuracy(axes)
    axes.set(xscale="log", xlabel="size of the file, MB", ylabel="accuracy on test, %")
    _set_ticks(axes.xaxis, (1, 2, 5), lambda size_mb: size_mb)
    weights = [Line2D([], [], linewidth=6, color=color, label=name) for name, color in colors.items()]
    forms = [
        Line2D([], [], **hollow, marker=marker, color="0.3", label=name) for name, marker in markers.items()
    ]
    figure.legend(handles=weights, loc="outside upper center", ncols=2, frameon=False)
    figure.legend(handles=forms, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)
    return True


def draw_training_curves(results: Results, path: Path) -> bool:
    """Draw accuracy on val by epoch, in a panel per script; return whether there was a curve to draw."""
    panels = training_curves(results)
    if not panels:
        return False
    figure = Figure(figsize=(10, 4 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            epochs, accuracies_pct = zip(*curve, strict=True)
            axes.plot(
                epochs, [*map(_error_pct, accuracies_pct)], marker=".", linewidth=1.3,
                color=COLORS[index % len(COLORS)], linestyle=LINES[index // len(COLORS) % len(LINES)],
                label=f"{name}, best {max(accuracies_pct):.2f} %",
            )  # fmt: skip
        _show_accuracy(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="epoch", ylabel="accuracy on val, %")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    _save(figure, path)
    return True


def training_curves(results: Results) -> dict[str, dict[str, Curve]]:
    """Return the curves of more than one epoch by record, grouped by the titles of their scripts."""
    panels: dict[str, dict[str, Curve]] = {script: {} for script in TITLES}
    for name, (script, curve) in results.read_all("*", _curve).items():
        if script in TITLES and len(curve) > 1:
            panels[script][name] = curve
    return {TITLES[script]: curves for script, curves in panels.items() if curves}


def _curve(content: Any) -> tuple[str, Curve]:
    """Return the script that wrote a record, and the curve if it has one."""
    history = content.get("results", {}).get("history", ())
    curve = [
        (int(number(row["epoch"])), number(row["val_accuracy_pct"]))
        for row in history
        if row["val_accuracy_pct"] is not None
    ]
    return Path(content["command"].split()[1]).name if curve else "", curve


PICTURES: dict[str, Callable[[Results, Path], bool]] = {
    "accuracy_against_size.png": draw_accuracy_against_size,
    "training_curves.png": draw_training_curves,
}


def _error_pct(accuracy_pct: float) -> float:
    return max(100 - accuracy_pct, SMALLEST_ERROR_PCT)


def _show_accuracy(axes: Axes) -> None:
    """Label errors, on a log scale so that good models do not lie on one line, with their accuracies."""
    axes.set_yscale("log")
    axes.invert_yaxis()
    _set_ticks(axes.yaxis, (1, 1.5, 2, 3, 4, 5, 6, 8), lambda error_pct: 100 - error_pct)
    axes.grid(alpha=0.3)


def _set_ticks(axis: Axis, steps: tuple[float, ...], shown: Callable[[float], float]) -> None:
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, _: f"{shown(value):g}")
    axis.set_minor_locator(LogLocator(subs=()))


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
