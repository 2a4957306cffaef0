"""Pictures of what was measured."""

import os
from collections.abc import Sequence

import numpy as np
import pandas as pd

from utils.files import atomic_write
from utils.scanning_log import Measurement

MOST_SENSITIVE_NAMED = 3
KINDS = ("expansion 1×1", "depthwise 3×3", "projection 1×1", "stem and classifier")
# Told apart by the colour-blind: Okabe & Ito's colours for layers, Tol's muted ones for bytes.
KIND_COLORS = dict(zip(KINDS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
BYTE_COLORS = {
    "values": "#332288",
    "positions": "#88CCEE",
    "scales": "#117733",
    "biases": "#DDCC77",
    "batch_norm": "#CC6677",
    "header": "#BBBBBB",
}
BYTES_PER_KB = 2**10
HISTOGRAM_BINS = 101
OUTLIERS = 0.001
"""Fraction of the weights that a histogram may leave out at its ends."""


def layer_kind(name: str, shape: Sequence[int]) -> str:
    """Which part of MobileNetV2 a layer is, one of KINDS, told by its weight's shape."""
    if len(shape) == 4 and shape[2:] == (1, 1):
        return KINDS[0] if shape[0] > shape[1] else KINDS[2]
    return KINDS[1] if len(shape) == 4 and shape[1] == 1 else KINDS[3]


def plot_sensitivity(
    path: str | os.PathLike,
    rows: Sequence[Measurement],
    shapes: dict[str, tuple[int, ...]],
    dense_accuracy_pct: float,
    threshold_pct: float,
) -> None:
    """Accuracy against the fraction kept, a curve a layer, as a PNG.

    Layers of a kind share a panel and are coloured by depth; the most sensitive are named.

    Args:
        path: of the PNG.
        rows: of a scan.
        shapes: the weight's shape of each layer, in forward order.
        dense_accuracy_pct: where every curve ends, with nothing pruned.
        threshold_pct: drawn as a line.

    Raises:
        UserError: the file cannot be written.
    """
    # A Figure without pyplot needs no display and leaves nothing global behind.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = dict(zip(KINDS, figure.subplots(2, 2, sharex=True, sharey=True).flat, strict=True))
    depth = {name: index / max(1, len(shapes) - 1) for index, name in enumerate(shapes)}
    lowest: dict[str, list[tuple[float, str]]] = {kind: [] for kind in KINDS}
    for name, shape in shapes.items():
        curve = sorted((row.keep_ratio, row.accuracy_pct) for row in rows if row.layer == name)
        if not curve:
            continue
        kind = layer_kind(name, shape)
        lowest[kind].append((curve[0][1], name))
        if curve[-1][0] < 1:
            curve.append((1.0, dense_accuracy_pct))
        color = colormaps["viridis"](0.95 * depth[name])
        axes[kind].plot(*zip(*curve, strict=True), marker="o", markersize=3, linewidth=1.2, color=color)
    smallest = min(row.keep_ratio for row in rows)
    for kind, axis in axes.items():
        axis.axhline(threshold_pct, color="tab:red", linewidth=1, linestyle="--")
        axis.set_title(f"{kind} ({len(lowest[kind])} layers)")
        axis.grid(alpha=0.3)
        named = sorted(lowest[kind])[:MOST_SENSITIVE_NAMED]
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
    scale = figure.colorbar(_depth_scale(), ax=list(axes.values()), shrink=0.6, label="layer")
    scale.set_ticks([0, 1], labels=["first", "last"])
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def plot_model(
    path: str | os.PathLike,
    title: str,
    weights: dict[str, np.ndarray],
    sizes: pd.DataFrame,
    histograms: dict[str, dict[str, np.ndarray]],
    histogram_of: str = "weight",
) -> None:
    """What is in a model file, as a PNG: density and weights of each layer, its bytes, histograms.

    Args:
        path: of the PNG.
        title: of the whole picture.
        weights: of each layer, in forward order.
        sizes: rows `layer`, `kind` and `bytes`, as `utils.packing.packed_sizes` gives them.
        histograms: by what to call them, one or two sets of weights by layer; of two, the first is
            the grey ground that the second is compared with.
        histogram_of: what the weights of the histograms are.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = {name: layer_kind(name, weight.shape) for name, weight in weights.items()}
    figure = Figure(figsize=(15, 17), layout="constrained")
    figure.suptitle(title, fontsize=14)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3, 1.15])
    handles = [Patch(color=color, label=kind) for kind, color in KIND_COLORS.items()]
    upper.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    density, count, size = upper.subplots(3, 1, sharex=True, height_ratios=[1, 1.2, 1.2])
    _plot_densities(density, weights, kinds)
    _plot_counts(count, weights, kinds)
    _plot_layer_bytes(size, sizes, list(weights))
    for axis in (density, count, size):
        _mark_blocks(axis, list(weights))
    size.set_xlim(-0.7, len(weights) - 0.3)
    labels = [name.removeprefix("features.") for name in weights]
    size.set_xticks(range(len(weights)), labels, rotation=90, fontsize=8)
    size.set_xlabel("layer, as in the CSV without “features.”; each shade is a block")

    *panels, totals = lower.subplots(1, len(KINDS) + 1, width_ratios=[*[1] * len(KINDS), 1.15])
    for panel, kind in zip(panels, KINDS, strict=True):
        _plot_histogram(
            panel,
            kind,
            {
                name: np.concatenate([layers[layer].ravel() for layer in layers if kinds[layer] == kind])
                for name, layers in histograms.items()
            },
            histogram_of,
        )
    panels[0].set_ylabel("weights that are not zero")
    _plot_kind_bytes(totals, sizes)
    with atomic_write(path) as temporary:
        # The version in the file would make equal pictures differ.
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _plot_densities(axis, weights: dict[str, np.ndarray], kinds: dict[str, str]) -> None:
    densities = [100 * np.count_nonzero(weight) / weight.size for weight in weights.values()]
    colors = [KIND_COLORS[kinds[name]] for name in weights]
    axis.bar(range(len(weights)), densities, color=colors, width=0.8)
    axis.set_ylim(0, 105)
    axis.set_ylabel("density %")
    axis.set_title("density: weights that are not zero, of all weights of the layer", fontsize=11)


def _plot_counts(axis, weights: dict[str, np.ndarray], kinds: dict[str, str]) -> None:
    totals = [weight.size for weight in weights.values()]
    nonzeros = [np.count_nonzero(weight) for weight in weights.values()]
    colors = [KIND_COLORS[kinds[name]] for name in weights]
    places = range(len(weights))
    # A layer without any weight is drawn where the axis ends.
    axis.vlines(places, np.maximum(nonzeros, 1), totals, colors=colors, linewidth=2, alpha=0.5)
    axis.scatter(places, totals, s=34, facecolors="white", edgecolors=colors, linewidths=1.3, zorder=3)
    axis.scatter(places, np.maximum(nonzeros, 1), s=34, color=colors, zorder=4)
    axis.set_yscale("log")
    axis.set_ylabel("weights")
    axis.set_title("size: all weights of the layer (rings) and those that are not zero (dots)", fontsize=11)


def _plot_layer_bytes(axis, sizes: pd.DataFrame, names: Sequence[str]) -> None:
    table = sizes.pivot_table(index="layer", columns="kind", values="bytes", aggfunc="sum", fill_value=0)
    table = table.reindex(names, fill_value=0) / BYTES_PER_KB
    bottom = np.zeros(len(names))
    for kind, color in BYTE_COLORS.items():
        if kind in table and table[kind].any():
            axis.bar(range(len(names)), table[kind], bottom=bottom, color=color, width=0.8, label=_say(kind))
            bottom += table[kind].to_numpy()
    axis.set_ylabel("KB in the file")
    axis.set_title("where the bytes of the file go", fontsize=11)
    axis.legend(loc="upper left", fontsize=9)


def _plot_kind_bytes(axis, sizes: pd.DataFrame) -> None:
    by_kind = sizes.groupby("kind")["bytes"].sum()
    kinds = [kind for kind in BYTE_COLORS if by_kind.get(kind, 0)]
    kilobytes = [by_kind[kind] / BYTES_PER_KB for kind in kinds]
    axis.barh(range(len(kinds)), kilobytes, color=[BYTE_COLORS[kind] for kind in kinds])
    for place, value in enumerate(kilobytes):
        share = 100 * value / sum(kilobytes)
        axis.text(value, place, f" {value:,.1f} KB, {share:.1f} %", va="center", fontsize=9)
    axis.set_yticks(range(len(kinds)), [_say(kind) for kind in kinds], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 2.4 * max(kilobytes))
    axis.set_xlabel("KB")
    axis.set_title(f"the whole file: {sum(kilobytes):,.1f} KB", fontsize=11)


def _plot_histogram(axis, kind: str, groups: dict[str, np.ndarray], histogram_of: str) -> None:
    nonzeros = {name: values[values != 0] for name, values in groups.items()}
    seen = np.abs(np.concatenate(list(nonzeros.values())))
    limit = np.quantile(seen, 1 - OUTLIERS) if seen.size else 1.0
    captions = [histogram_of]
    for name, values in nonzeros.items():
        # What there was before stands as a grey ground behind what there is.
        is_ground = len(groups) > 1 and name == next(iter(groups))
        color = "#BBBBBB" if is_ground else KIND_COLORS[kind]
        axis.hist(
            values, np.linspace(-limit, limit, HISTOGRAM_BINS), histtype="stepfilled", alpha=0.75, color=color
        )
        share = 100 * len(values) / len(groups[name])
        captions.append(f"{name}: {share:.1f} % not zero{' (grey)' if is_ground else ''}")
    if seen.size:
        axis.set_yscale("log")
    axis.set_title(f"{kind}: {len(next(iter(groups.values()))):,}", fontsize=11)
    axis.set_xlabel("\n".join(captions), fontsize=9)


def _mark_blocks(axis, names: Sequence[str]) -> None:
    """Shade every other block, so that the eye finds a column's layer."""
    blocks = [name.split(".")[1] if name.startswith("features.") else name for name in names]
    for place, block in enumerate(blocks):
        if list(dict.fromkeys(blocks)).index(block) % 2:
            axis.axvspan(place - 0.5, place + 0.5, color="0.93", zorder=0, linewidth=0)
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.4)


def _say(kind: str) -> str:
    return {"batch_norm": "batch norms", "header": "header, other"}.get(kind, kind)


def _depth_scale():
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(cmap="viridis")
