"""The picture of a model file: density, size and weights of each layer, and a packed file's bytes."""

import os
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from models.folding import folded_weights
from models.statistics import LAYER_KINDS, layer_kind, prunable_layers
from utils.checkpoints.weights import Weights
from utils.common.files import atomic_write
from utils.open_model import ModelFile
from utils.quantization.int8_model import Int8Model

if TYPE_CHECKING:
    import pandas as pd

# Safe for colour-blind readers: Okabe & Ito's colours for layers, Tol's muted ones for bytes.
KIND_COLORS = dict(zip(LAYER_KINDS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
BYTE_COLORS = {
    "values": "#332288",
    "positions": "#88CCEE",
    "scales": "#117733",
    "biases": "#DDCC77",
    "batch_norm": "#CC6677",
}
HISTOGRAM_BINS = 101
OUTLIERS = 0.001
"""Fraction of the weights that a histogram may leave out at its ends."""


def has_batch_norms(file: ModelFile) -> bool:
    """Return whether the file holds batch norms; otherwise they are folded into the weights."""
    return isinstance(file.source, Weights)


def layer_weights(file: ModelFile, fold: bool = False) -> dict[str, np.ndarray]:
    """Return the weight of each layer in forward order; int8 ones as the real values they stand for.

    Args:
        file: of any kind.
        fold: fold batch norms into the weights, where the file has not done so.
    """
    source: Any = file.source
    if isinstance(source, Int8Model):
        weights = source.dequantized_weights()
    elif fold and has_batch_norms(file):
        weights = folded_weights(source.model)
    else:
        model = source.model if has_batch_norms(file) else source
        weights = {name: layer.weight.detach() for name, layer in prunable_layers(model).items()}
    return {name: weight.numpy() for name, weight in weights.items()}


def plot_model(
    path: str | os.PathLike,
    title: str,
    weights: dict[str, np.ndarray],
    sizes: "pd.DataFrame | None",
    histograms: dict[str, dict[str, np.ndarray]],
    histogram_of: str = "weight",
) -> None:
    """Draw a model file as a PNG: density, weights and, if packed, bytes of each layer; histograms.

    Args:
        path: of the PNG.
        title: of the whole picture.
        weights: of each layer, in forward order.
        sizes: of a packed file, as `utils.packing.pack.packed_sizes` gives them; None for other files.
        histograms: one or two sets of weights by layer, under their captions; if two, the first is drawn
            in grey for comparison.
        histogram_of: caption of the weights in the histograms.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = {name: layer_kind(name, weight.shape) for name, weight in weights.items()}
    colors = [KIND_COLORS[kind] for kind in kinds.values()]
    totals = np.array([weight.size for weight in weights.values()])
    nonzeros = np.array([np.count_nonzero(weight) for weight in weights.values()])
    places = range(len(weights))
    figure = Figure(figsize=(15, 17), layout="constrained")
    figure.suptitle(title, fontsize=14, parse_math=False)  # it names a file, which may hold a $
    rows: Any = figure.subfigures(2, 1, height_ratios=[3, 1.15])
    upper, lower = rows
    handles = [Patch(color=color, label=kind) for kind, color in KIND_COLORS.items()]
    upper.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    axes = upper.subplots(2 if sizes is None else 3, 1, sharex=True)
    density, count = axes[:2]
    density.bar(places, 100 * nonzeros / totals, color=colors)
    density.set(ylim=(0, 105), ylabel="density %", title="weights that are not zero, of all of the layer")
    count.bar(places, totals, color=colors, alpha=0.35)
    count.bar(places, nonzeros, color=colors)
    count.set(yscale="log", ylabel="weights", title="all weights (pale) and those that are not zero")
    if sizes is not None:
        _plot_bytes(axes[2], sizes, list(weights))
    # Shade every other block, so that the eye finds a column's layer.
    for index, (_, block) in enumerate(groupby(enumerate(weights), lambda place: place[1].split(".")[:2])):
        columns = [place for place, _ in block]
        for axis in axes if index % 2 else ():
            axis.axvspan(columns[0] - 0.5, columns[-1] + 0.5, color="0.93", zorder=0, linewidth=0)
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.4)
    axes[-1].set_xlim(-0.7, len(weights) - 0.3)
    axes[-1].set_xticks(places, [name.removeprefix("features.") for name in weights], rotation=90, fontsize=8)
    axes[-1].set_xlabel("layer, as in the CSV without “features.”; each shade is a block")

    panels = lower.subplots(1, len(LAYER_KINDS))
    for panel, kind in zip(panels, LAYER_KINDS, strict=True):
        groups = {
            name: np.concatenate([layers[layer].ravel() for layer in layers if kinds[layer] == kind])
            for name, layers in histograms.items()
        }
        _plot_histogram(panel, kind, groups, histogram_of)
    panels[0].set_ylabel("weights that are not zero")
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _plot_bytes(axis, sizes: "pd.DataFrame", names: list[str]) -> None:
    table = sizes.pivot_table(index="layer", columns="kind", values="bytes", aggfunc="sum", fill_value=0)
    table = table.reindex(names, fill_value=0) / 2**10  # KB
    bottom = np.zeros(len(names))
    for kind, color in BYTE_COLORS.items():
        if kind in table and table[kind].any():
            axis.bar(range(len(names)), table[kind], bottom=bottom, color=color, label=kind.replace("_", " "))
            bottom += table[kind].to_numpy()
    axis.set(ylabel="KB in the file", title="where the bytes of the layers go")
    axis.legend(loc="upper left", fontsize=9)


def _plot_histogram(axis, kind: str, groups: dict[str, np.ndarray], histogram_of: str) -> None:
    nonzeros = {name: values[values != 0] for name, values in groups.items()}
    seen = np.abs(np.concatenate(list(nonzeros.values())))
    limit = np.quantile(seen, 1 - OUTLIERS) if seen.size else 1.0
    bins = np.linspace(-limit, limit, HISTOGRAM_BINS)
    # The weights to compare with are drawn in grey below the others.
    colors = ["#BBBBBB", KIND_COLORS[kind]][-len(groups) :]
    captions = [histogram_of]
    for color, (name, values) in zip(colors, nonzeros.items(), strict=True):
        axis.hist(values, bins, histtype="stepfilled", alpha=0.75, color=color)
        share = 100 * len(values) / len(groups[name])
        captions.append(f"{name}: {share:.1f} % not zero{' (grey)' if color == '#BBBBBB' else ''}")
    if seen.size:
        axis.set_yscale("log")
    axis.set_title(f"{kind}: {len(next(iter(groups.values()))):,}", fontsize=11)
    axis.set_xlabel("\n".join(captions), fontsize=9)
