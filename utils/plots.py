"""The picture of a model file: density, size and weights of each layer, and where the bytes go."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from models.folding import folded_weights
from models.statistics import LAYER_KINDS, layer_kind, prunable_layers
from utils.checkpoints.weights import Weights
from utils.common.files import atomic_write
from utils.open_model import ModelFile
from utils.packing.format import is_packed
from utils.packing.pack import packed_sizes
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
    "header": "#BBBBBB",
}
BYTES_PER_KB = 2**10
HISTOGRAM_BINS = 101
OUTLIERS = 0.001
"""Fraction of the weights that a histogram may leave out at its ends."""


def has_batch_norms(file: ModelFile) -> bool:
    """Whether the file holds batch norms; otherwise they are folded into the weights."""
    return isinstance(file.source, Weights)


def layer_weights(file: ModelFile, fold: bool = False) -> dict[str, np.ndarray]:
    """Return the weight of each layer in forward order; int8 ones as the real values they stand for.

    Args:
        file: of any kind.
        fold: fold batch norms into the weights, where the file has not done so.
    """
    if isinstance(file.source, Int8Model):
        weights = file.source.dequantized_weights()
    elif isinstance(file.source, Weights):
        model: Any = file.source.model
        weights = folded_weights(model) if fold else _weights_of(model)
    else:
        weights = _weights_of(file.source)
    return {name: weight.numpy() for name, weight in weights.items()}


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in prunable_layers(model).items()}


def file_bytes(file: ModelFile) -> "pd.DataFrame":
    """Return where the bytes of a file go.

    Returns:
        Columns as those of `packed_sizes`. What is no tensor of a layer counts as header, in a layer
        without a name. The sum of `bytes` is the size of the file.
    """
    import pandas as pd

    if is_packed(file.path):
        return packed_sizes(file.path)
    rows = _int8_bytes(file.source) if isinstance(file.source, Int8Model) else _float_bytes(file)
    rows.append(("", "header", file.path.stat().st_size - sum(size for _, _, size in rows)))
    sizes = pd.DataFrame(rows, columns=["layer", "kind", "bytes"])
    return sizes.groupby(["layer", "kind"], sort=False, as_index=False).sum()


def _float_bytes(file: ModelFile) -> list[tuple[str, str, int]]:
    model: Any = file.source.model if isinstance(file.source, Weights) else file.source
    layers, layer, rows = prunable_layers(model), "", []
    for name, module in model.named_modules():
        # A batch norm belongs to the layer before it.
        layer = name if name in layers else layer
        kinds = {"weight": "values", "bias": "biases"} if name in layers else {}
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            rows.append((layer, kinds.get(key, "batch_norm"), value.nbytes))
    return rows


def _int8_bytes(model: Int8Model) -> list[tuple[str, str, int]]:
    rows = []
    for name, weight in model.weights.items():
        rows += [(name, "values", weight.nbytes), (name, "biases", model.biases[name].nbytes)]
        if model.per_channel:
            # TorchScript holds scales as float64 and zero points as int64.
            rows.append((name, "scales", 16 * len(model.scales[name])))
    return rows


def plot_model(
    path: str | os.PathLike,
    title: str,
    weights: dict[str, np.ndarray],
    sizes: "pd.DataFrame",
    histograms: dict[str, dict[str, np.ndarray]],
    histogram_of: str = "weight",
) -> None:
    """Draw a model file as a PNG: the density, weights and bytes of each layer, and histograms.

    Args:
        path: of the PNG.
        title: of the whole picture.
        weights: of each layer, in forward order.
        sizes: rows `layer`, `kind` and `bytes`, as `utils.packing.pack.packed_sizes` gives them.
        histograms: one or two sets of weights by layer, under their captions; if two, the first is drawn
            in grey for comparison.
        histogram_of: caption of the weights in the histograms.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = {name: layer_kind(name, weight.shape) for name, weight in weights.items()}
    figure = Figure(figsize=(15, 17), layout="constrained")
    figure.suptitle(title, fontsize=14, parse_math=False)  # it names a file, which may hold a $
    rows: Any = figure.subfigures(2, 1, height_ratios=[3, 1.15])
    upper, lower = rows
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

    *panels, totals = lower.subplots(1, len(LAYER_KINDS) + 1, width_ratios=[*[1] * len(LAYER_KINDS), 1.15])
    for panel, kind in zip(panels, LAYER_KINDS, strict=True):
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


def _plot_layer_bytes(axis, sizes: "pd.DataFrame", names: list[str]) -> None:
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


def _plot_kind_bytes(axis, sizes: "pd.DataFrame") -> None:
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
