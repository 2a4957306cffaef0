"""Plot a sensitivity scan."""

import os
from collections.abc import Sequence

import numpy as np

from models.statistics import LAYER_KINDS, layer_kind
from utils.common.files import atomic_write
from utils.pruning.scanning_log import Measurement

MOST_SENSITIVE_NAMED = 3


def plot_sensitivity(
    path: str | os.PathLike,
    rows: Sequence[Measurement],
    shapes: dict[str, tuple[int, ...]],
    dense_accuracy_pct: float,
    threshold_pct: float,
) -> None:
    """Write a PNG of accuracy against the fraction kept, with one curve per layer.

    Layers of the same kind share a panel and are coloured by depth. The most sensitive ones are named.

    Args:
        path: the PNG to write.
        rows: the measurements of a scan.
        shapes: the shape of each layer's weight, in forward order.
        dense_accuracy_pct: accuracy of the unpruned model, where every curve ends.
        threshold_pct: accuracy that is drawn as a dashed line.

    Raises:
        UserError: the file cannot be written.
    """
    # A Figure without pyplot needs no display and changes no global state.
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    kinds = {name: layer_kind(name, shape) for name, shape in shapes.items()}
    colors = dict(zip(shapes, colormaps["viridis"](np.linspace(0, 0.95, len(shapes))), strict=True))
    smallest = min(row.keep_ratio for row in rows)
    for kind, axis in zip(LAYER_KINDS, panels, strict=True):
        lowest = []
        for name in (name for name in dict.fromkeys(row.layer for row in rows) if kinds[name] == kind):
            curve = {row.keep_ratio: row.accuracy_pct for row in rows if row.layer == name}
            ratios, accuracies = zip(*sorted(({1.0: dense_accuracy_pct} | curve).items()), strict=True)
            axis.plot(ratios, accuracies, marker="o", markersize=3, linewidth=1.2, color=colors[name])
            lowest.append((accuracies[0], name))
        axis.axhline(threshold_pct, color="tab:red", linewidth=1, linestyle="--")
        axis.set_title(f"{kind} ({len(lowest)} layers)")
        axis.grid(alpha=0.3)
        named = sorted(lowest)[:MOST_SENSITIVE_NAMED]
        text = "\n".join(f"{accuracy_pct:.1f} %  {name}" for accuracy_pct, name in named)
        axis.text(
            0.98, 0.03, f"lowest at {smallest:g} kept:\n{text}", transform=axis.transAxes,
            ha="right", va="bottom", fontsize=8, bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0},
        )  # fmt: skip
    figure.suptitle(
        f"each layer pruned alone; unpruned {dense_accuracy_pct:.2f} %, threshold {threshold_pct:g} % dashed"
    )
    figure.supxlabel("sparsity: fraction of the layer's weights kept, all other layers whole")
    figure.supylabel("accuracy %")
    scale = figure.colorbar(ScalarMappable(cmap="viridis"), ax=figure.axes, shrink=0.6, label="layer")
    scale.set_ticks([0, 1], labels=["first", "last"])
    with atomic_write(path) as temporary:
        # Matplotlib's version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
