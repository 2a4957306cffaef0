"""Choose how many weights each layer keeps so that the whole model reaches a target density.

The budget covers all nonzero parameters, as `models.statistics` counts them. Batch norms and biases are not
pruned; the rest of the budget is divided exactly among the weights of the layers. A weight that is already
zero does not count as kept.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from models import MobileNetV2
from models.folding import folded_weights
from models.statistics import LAYER_KINDS, LayerStatistics, ModelStatistics, layer_kind, prunable_layers
from utils.common.csv_files import suggest
from utils.common.errors import UserError
from utils.pruning.pruner import kept_count
from utils.pruning.scanning_log import Measurement

METHODS = ("uniform", "erk", "global", "lamp", "sensitivity")
DEFAULT_METHOD = "lamp"
GROUPS = ("stem", "depthwise", "classifier")
"""Names that stand for the first layer, the depthwise convolutions and the last layer."""
BISECTIONS = 200
"""More halvings than a float64 has bits."""
DENSITY_DECIMALS = 6
POINTS_BETWEEN = 15
"""Interpolated points of a loss curve between two measured ones."""

Curve = list[tuple[int, float]]
"""Points (weights kept, loss) of a layer by increasing count: convex, and the loss never increases."""


@dataclass(frozen=True)
class Limits:
    """The smallest and the largest number of weights that a layer may keep."""

    least: int
    most: int


def layer_limits(
    layers: Sequence[LayerStatistics],
    *,
    spare: Iterable[str] = (),
    keep_at_least: Iterable[tuple[str, float]] = (),
    keep_at_most: Iterable[tuple[str, float]] = (),
    keep_per_channel: int = 0,
    curves: Mapping[str, Curve] | None = None,
) -> dict[str, Limits]:
    """Return the limits of each layer. If several name the same layer, all of them apply.

    Args:
        layers: statistics of the model's prunable layers.
        spare: layers or GROUPS that are not pruned.
        keep_at_least: pairs of a layer or group and the smallest fraction of its weights to keep.
        keep_at_most: pairs of a layer or group and the largest fraction of its weights to keep; takes
            precedence over the arguments below.
        keep_per_channel: weights that every layer keeps at least per output channel, averaged over the
            layer.
        curves: from `loss_curves`; a layer keeps at least as many weights as its curve starts with.

    Raises:
        UserError: a layer is unknown, or its limits contradict each other.
    """
    totals = {layer.name: layer.parameters for layer in layers}
    names = list(totals)
    depthwise = [layer.name for layer in layers if layer_kind(layer.name, layer.shape) == LAYER_KINDS[1]]
    selections = {"stem": names[:1], "depthwise": depthwise, "classifier": names[-1:]}
    selections |= {name: [name] for name in names}

    def select(selector: str) -> list[str]:
        if selector not in selections:
            raise UserError(
                f"the model has no layer {selector!r}{suggest(selector, selections)} "
                f"(give a layer's name, or one of {', '.join(GROUPS)})"
            )
        return selections[selector]

    least = dict.fromkeys(totals, 0)
    # A weight that is already zero cannot be kept.
    most = {layer.name: layer.nonzeros for layer in layers}
    for selector, keep_ratio in [*((selector, 1.0) for selector in spare), *keep_at_least]:
        for name in select(selector):
            least[name] = max(least[name], min(most[name], kept_count(totals[name], keep_ratio)))
    for selector, keep_ratio in keep_at_most:
        for name in select(selector):
            most[name] = min(most[name], kept_count(totals[name], keep_ratio))
            if most[name] < least[name]:
                raise UserError(
                    f"{name} must keep at most {most[name]} but at least {least[name]} of its "
                    f"{totals[name]} weights: change --keep_at_most, --keep_at_least or --spare"
                )
    for layer in layers:
        measured_from = curves[layer.name][0][0] if curves else 0
        floor = max(keep_per_channel * layer.shape[0], measured_from)
        least[layer.name] = max(least[layer.name], min(floor, most[layer.name]))
    return {name: Limits(least[name], most[name]) for name in least}


def weight_budget(target: float, statistics: ModelStatistics, limits: dict[str, Limits]) -> int:
    """Return how many weights all layers keep together for the density nearest to `target`.

    Args:
        target: fraction of all parameters that should be nonzero.
        statistics: of the model before pruning.
        limits: by layer.

    Raises:
        UserError: the limits do not allow this density.
    """
    parameters = statistics.parameters
    unprunable = statistics.nonzeros - sum(layer.nonzeros for layer in statistics.layers)
    budget = round(target * parameters) - unprunable
    smallest = sum(limit.least for limit in limits.values())
    largest = sum(limit.most for limit in limits.values())
    # The suggested densities are rounded towards the possible ones, so that they work.
    scale = 10**DENSITY_DECIMALS
    if budget < smallest:
        raise UserError(
            f"--target {target:g} is out of reach, the smallest density possible is "
            f"{math.ceil((unprunable + smallest) / parameters * scale) / scale}: of {parameters} parameters, "
            f"batch norms and biases have {unprunable}, and the limits of the layers (--spare, "
            f"--keep_at_least, --keep_per_channel, the scan's smallest sparsity) keep {smallest}"
        )
    if budget > largest:
        raise UserError(
            f"--target {target:g} is out of reach, the largest density possible is "
            f"{math.floor((unprunable + largest) / parameters * scale) / scale}: of {parameters} parameters, "
            f"{statistics.nonzeros} are not zero, of which --keep_at_most leaves {unprunable + largest}"
        )
    return budget


def allocate(
    method: str,
    model: MobileNetV2,
    layers: Sequence[LayerStatistics],
    limits: dict[str, Limits],
    budget: int,
    curves: dict[str, Curve] | None = None,
) -> dict[str, int]:
    """Return how many weights each layer keeps, within its limits; the numbers sum to the budget.

    Args:
        method: one of METHODS.

            - uniform: keep the same fraction of each layer.
            - erk: Erdős–Rényi-Kernel (Evci et al., 2020, https://arxiv.org/abs/1911.11134). A layer's density
              is proportional to the sum of its weight's dimensions over their product, so the number of
              weights it keeps is proportional to the sum. Layers whose density would exceed 1 are not
              pruned, and the others share the rest.
            - global: apply one magnitude threshold to all layers (Han et al., 2015,
              https://arxiv.org/abs/1506.02626). Scaling a convolution before a batch norm does not change the
              outputs, so magnitudes are compared with the batch norms folded in. This only chooses how many
              weights a layer keeps; prune.py chooses which, by raw magnitude. The classifier has no batch
              norm and its weights are small, so it is best spared.
            - lamp: apply one threshold to the `lamp_scores` of all layers.
            - sensitivity: see `least_loss`.
        model: a float model.
        layers: statistics of its prunable layers.
        limits: by layer; for "sensitivity" made with the curves.
        budget: from `weight_budget`.
        curves: from `loss_curves`, for "sensitivity" only.
    """
    match method:
        case "uniform":
            return fill({layer.name: layer.parameters for layer in layers}, limits, budget)
        case "erk":
            return fill({layer.name: sum(layer.shape) for layer in layers}, limits, budget)
        case "global":
            return keep_largest({k: w.abs() for k, w in folded_weights(model).items()}, limits, budget)
        case "lamp":
            weights = {name: layer.weight.detach() for name, layer in prunable_layers(model).items()}
            return keep_largest({k: lamp_scores(w.flatten()) for k, w in weights.items()}, limits, budget)
    assert method == "sensitivity" and curves is not None
    return least_loss(curves, limits, budget)


def lamp_scores(weight: Tensor) -> Tensor:
    """Return the score of each weight in layer-adaptive magnitude-based pruning.

    In order of increasing magnitude, it is the weight's square over the sum of its square and all later ones
    (Lee et al., 2021, https://arxiv.org/abs/2010.07611, equation 3). Among equal magnitudes the first in
    `weight` comes last, because pruning keeps it longest.

    Args:
        weight: (n,).

    Returns:
        float64 (n,), in the order of `weight`: 1 for the layer's largest weight, 0 for zeros.
    """
    squares = weight.double().square()
    falling, order = squares.sort(descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = falling / falling.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return scores


def loss_curves(
    model: nn.Module, layers: Sequence[LayerStatistics], measurements: Sequence[Measurement]
) -> dict[str, Curve]:
    """Return the loss against the number of weights kept, for each layer pruned alone.

    Near a minimum the loss grows with the square of the change in the weights, so between two measurements
    it is interpolated by the sum of the squared pruned weights. Where pruning more lowered the measured loss,
    the larger loss at the higher count is used. Points above the lower convex hull are dropped.

    Args:
        model: the scanned model.
        layers: statistics of its prunable layers.
        measurements: all rows of a scan of these layers. If none is at sparsity 1, the smallest loss
            stands for that of the unpruned model.
    """
    whole = [row.loss for row in measurements if row.keep_ratio == 1]
    base = min(whole or [row.loss for row in measurements])
    curves, layers_by_name = {}, prunable_layers(model)
    for layer in layers:
        points = {layer.nonzeros: base}
        for row in measurements:
            if row.layer == layer.name and row.keep_ratio < 1:
                # If the layer was pruned before the scan, several sparsities keep the same weights.
                count = min(kept_count(layer.parameters, row.keep_ratio), layer.nonzeros)
                points[count] = max(row.loss, points.get(count, base))
        counts = sorted(points)
        losses = np.maximum.accumulate([points[count] for count in reversed(counts)])[::-1]
        squares = np.sort(layers_by_name[layer.name].weight.detach().double().square().flatten().numpy())
        pruned_by_count = np.append(0.0, squares.cumsum())[::-1]
        between = [np.linspace(*ends, POINTS_BETWEEN + 2).astype(int) for ends in pairwise(counts)]
        denser = np.unique(np.concatenate([counts, *between]))
        # np.interp wants increasing positions.
        interpolated = np.interp(-pruned_by_count[denser], -pruned_by_count[counts], losses)
        curves[layer.name] = _convex(zip(denser.tolist(), interpolated.tolist(), strict=True))
    return curves


def least_loss(curves: dict[str, Curve], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Minimize the loss predicted by a scan of each layer alone (Han et al., 2015, section 3.1).

    The increases in loss are assumed to add up over the layers. The curves are convex, so giving each weight
    to the layer with the steepest curve minimizes the sum.

    Args:
        curves: from `loss_curves`.
        limits: from `layer_limits`, given these curves.
        budget: weights kept in all layers together, from `weight_budget`.

    Returns:
        The number of weights to keep, by layer.
    """
    kept = Counter({name: limit.least for name, limit in limits.items()})
    steps: dict[float, Counter[str]] = defaultdict(Counter)
    for name, curve in curves.items():
        for (start, high), (end, low) in pairwise(curve):
            weights = min(end, limits[name].most) - max(start, limits[name].least)
            if weights > 0:
                steps[(high - low) / (end - start)][name] += weights
    for slope in sorted(steps, reverse=True):
        taken, left = steps[slope], budget - kept.total()
        if taken.total() > left:
            # Too few for all layers of this slope: they share the rest. Common where the curves are flat.
            taken = Counter(fill(taken, {name: Limits(0, most) for name, most in taken.items()}, left))
        kept.update(taken)
    return dict(kept)


def fill(shares: Mapping[str, float], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Divide `budget` into integers proportional to `shares`, within the limits.

    Where a limit changes a layer's number, the others make up the difference in proportion. Fractions are
    rounded by the largest-remainder method.

    Args:
        shares: positive numbers by layer.
        limits: for the same layers.
        budget: between the sums of the limits.
    """
    rows = [(shares[name], limit.least, limit.most) for name, limit in limits.items()]
    share, least, most = np.array(rows, dtype=np.float64).T
    low, high = 0.0, float((most / share).max())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if np.clip(share * middle, least, most).sum() < budget:
            low = middle
        else:
            high = middle
    exact = np.clip(share * high, least, most)
    counts = np.floor(exact).astype(int)
    missing = budget - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return dict(zip(limits, counts.tolist(), strict=True))


def keep_largest(scores: dict[str, Tensor], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Return how many of the `budget` largest scores are in each layer, within the limits.

    Args:
        scores: of the weights of each layer, in any shape; the first of equal scores is taken.
        limits: by layer.
        budget: between the sums of the limits.
    """
    # A layer always keeps its `least` largest scores, and none after the first `most`.
    contested = [
        scores[name].detach().flatten().double().sort(descending=True).values[limit.least : limit.most]
        for name, limit in limits.items()
    ]
    owner = torch.repeat_interleave(torch.tensor([len(part) for part in contested]))
    order = torch.cat(contested).argsort(descending=True, stable=True)
    free = budget - sum(limit.least for limit in limits.values())
    won = torch.bincount(owner[order[:free]], minlength=len(limits)).tolist()
    return {name: limit.least + count for (name, limit), count in zip(limits.items(), won, strict=True)}


def shortest_keep_ratio(kept: int, total: int) -> float:
    """Return the fraction with the fewest decimals that keeps exactly `kept` of `total` weights.

    Fractions near half a weight, where rounding could go either way, are avoided.
    """
    for decimals in range(1, 18):
        ratio = round(kept / total, decimals)
        if abs(ratio * total - kept) < 0.25 and kept_count(total, ratio) == kept:
            return ratio
    return kept / total


def _convex(points: Iterable[tuple[int, float]]) -> Curve:
    """Return the lower convex hull of points sorted by count, whose loss never increases."""
    hull: Curve = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
