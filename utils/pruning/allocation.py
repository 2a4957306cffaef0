"""Choose how many weights each layer keeps so that the whole model reaches a target density.

The budget covers all nonzero parameters, as `models.statistics` counts them. Batch norms and biases are not
pruned; the rest of the budget is divided exactly among the weights of the layers. A weight that is already
zero does not count as kept.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from models import MobileNetV2
from models.folding import folded_weights
from models.statistics import LayerStatistics, ModelStatistics, prunable_layers
from utils.common.csv_files import suggest
from utils.common.errors import UserError
from utils.pruning.pruner import kept_count
from utils.pruning.scanning_log import Measurement

METHODS = ("uniform", "erk", "global", "lamp", "sensitivity")
DEFAULT_METHOD = "lamp"
GROUPS = ("stem", "depthwise", "classifier")
BISECTIONS = 200
"""More halvings than a float64 has bits."""
DENSITY_DECIMALS = 6
POINTS_BETWEEN = 15
"""Interpolated points of a loss curve between two measured ones."""


@dataclass(frozen=True)
class Limits:
    """The smallest and the largest number of weights that a layer may keep."""

    least: int
    most: int


def select_layers(selector: str, model: nn.Module) -> list[str]:
    """Return the names of the layers that `selector` stands for.

    Args:
        selector: a layer's name, or one of GROUPS (first layer, depthwise convolutions, last layer).
        model: the model.

    Raises:
        UserError: the selector is neither.
    """
    layers = prunable_layers(model)
    names = list(layers)
    depthwise = [name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1]
    selections = dict(zip(GROUPS, ([names[0]], depthwise, [names[-1]]), strict=True))
    selections |= {name: [name] for name in names}
    if selector in selections:
        return selections[selector]
    raise UserError(
        f"the model has no layer {selector!r}{suggest(selector, selections)} "
        f"(give a layer's name, or one of {', '.join(GROUPS)})"
    )


def layer_limits(
    model: nn.Module,
    layers: Sequence[LayerStatistics],
    *,
    spare: Iterable[str] = (),
    keep_at_least: Iterable[tuple[str, float]] = (),
    keep_at_most: Iterable[tuple[str, float]] = (),
    keep_per_channel: int = 0,
) -> dict[str, Limits]:
    """Return the limits of each layer. If several name the same layer, all of them apply.

    Args:
        model: the model.
        layers: statistics of its prunable layers.
        spare: layers or GROUPS that are not pruned.
        keep_at_least: pairs of a layer or group and the smallest fraction of its weights to keep.
        keep_at_most: pairs of a layer or group and the largest fraction of its weights to keep.
        keep_per_channel: weights that every layer keeps at least per output channel, averaged over the
            layer; `keep_at_most` takes precedence.

    Raises:
        UserError: a layer is unknown, or its limits contradict each other.
    """
    totals = {layer.name: layer.parameters for layer in layers}
    least = {layer.name: 0 for layer in layers}
    # A weight that is already zero cannot be kept.
    most = {layer.name: layer.nonzeros for layer in layers}
    for selector in spare:
        for name in select_layers(selector, model):
            least[name] = most[name]
    for selector, keep_ratio in keep_at_least:
        for name in select_layers(selector, model):
            least[name] = max(least[name], min(most[name], kept_count(totals[name], keep_ratio)))
    for selector, keep_ratio in keep_at_most:
        for name in select_layers(selector, model):
            most[name] = min(most[name], kept_count(totals[name], keep_ratio))
            if most[name] < least[name]:
                raise UserError(
                    f"{name} is to keep at most {most[name]} and at least {least[name]} of its "
                    f"{totals[name]} weights: change --keep_at_most, --keep_at_least or --spare"
                )
    for layer in layers:
        floor = min(keep_per_channel * layer.shape[0], most[layer.name])
        least[layer.name] = max(least[layer.name], floor)
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
    unprunable = statistics.nonzeros - sum(layer.nonzeros for layer in statistics.layers)
    nonzeros = round(target * statistics.parameters)
    smallest = unprunable + sum(limit.least for limit in limits.values())
    largest = unprunable + sum(limit.most for limit in limits.values())
    if smallest <= nonzeros <= largest:
        return nonzeros - unprunable
    # Rounded towards the possible densities, so that the suggested number works.
    scale, parameters = 10**DENSITY_DECIMALS, statistics.parameters
    if nonzeros < smallest:
        raise UserError(
            f"--target {target:g} is out of reach, the smallest density possible is "
            f"{math.ceil(smallest / parameters * scale) / scale}: of {parameters} parameters, batch norms "
            f"and biases have {unprunable}, and the limits of the layers (--spare, --keep_at_least, "
            f"--keep_per_channel, the scan's smallest sparsity) keep {smallest - unprunable}"
        )
    raise UserError(
        f"--target {target:g} is out of reach, the largest density possible is "
        f"{math.floor(largest / parameters * scale) / scale}: of {parameters} parameters, "
        f"{statistics.nonzeros} are not zero, of which --keep_at_most leaves {largest}"
    )


def uniform(layers: Sequence[LayerStatistics], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Keep the same fraction of each layer, as far as its limits allow.

    Args:
        layers: statistics of the prunable layers.
        limits: by layer.
        budget: weights kept in all layers together, from `weight_budget`.

    Returns:
        The number of weights to keep, by layer.
    """
    return fill({layer.name: layer.parameters for layer in layers}, limits, budget)


def erk(layers: Sequence[LayerStatistics], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Allocate by Erdős–Rényi-Kernel (Evci et al., 2020, https://arxiv.org/abs/1911.11134).

    A layer's density is proportional to the sum of its weight's dimensions over their product, so the number
    of weights it keeps is proportional to the sum. Layers whose density would exceed 1 are not pruned, and
    the others share the rest. Arguments and result are those of `uniform`.
    """
    return fill({layer.name: sum(layer.shape) for layer in layers}, limits, budget)


def global_magnitude(model: MobileNetV2, limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Apply one magnitude threshold to all layers (Han et al., 2015, https://arxiv.org/abs/1506.02626).

    Scaling a convolution before a batch norm does not change the outputs, so raw magnitudes of different
    layers cannot be compared. Weights are compared with their batch norms folded in. This only chooses how
    many weights a layer keeps; prune.py chooses which, by raw magnitude. The classifier has no batch norm and
    its weights are small, so it is best spared.

    Args:
        model: a float model.
        limits: by layer.
        budget: weights kept in all layers together, from `weight_budget`.

    Returns:
        The number of weights to keep, by layer.
    """
    scores = {name: weight.abs() for name, weight in folded_weights(model).items()}
    return keep_largest(scores, limits, budget)


def lamp(model: nn.Module, limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Apply one threshold to the LAMP scores of all layers.

    Layer-adaptive magnitude-based pruning (Lee et al., 2021, https://arxiv.org/abs/2010.07611).
    Arguments and result are those of `global_magnitude`.
    """
    layers = prunable_layers(model)
    scores = {name: lamp_scores(layer.weight.detach().flatten()) for name, layer in layers.items()}
    return keep_largest(scores, limits, budget)


def lamp_scores(weight: Tensor) -> Tensor:
    """Return the LAMP score of each weight (equation 3 of Lee et al., 2021).

    In order of increasing magnitude, the score is the weight's square over the sum of its square and all
    later ones. Among equal magnitudes the first in `weight` comes last, because pruning keeps it longest.

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


Curve = list[tuple[int, float]]
"""Points (weights kept, loss) of a layer by increasing count: convex, and the loss never increases."""


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
        weight = layers_by_name[layer.name].weight.detach()
        curves[layer.name] = _convex(_interpolated(_rising(points), weight))
    return curves


def measured_limits(limits: dict[str, Limits], curves: dict[str, Curve]) -> dict[str, Limits]:
    """Return the limits raised to where the curves begin, since no loss was measured below."""
    return {
        name: Limits(max(limit.least, min(limit.most, curves[name][0][0])), limit.most)
        for name, limit in limits.items()
    }


def sensitivity(curves: dict[str, Curve], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Minimize the loss predicted by a scan of each layer alone (Han et al., 2015, section 3.1).

    The increases in loss are assumed to add up over the layers. The curves are convex, so giving each weight
    to the layer with the steepest curve minimizes the sum.

    Args:
        curves: from `loss_curves`.
        limits: from `measured_limits`.
        budget: weights kept in all layers together, from `weight_budget`.

    Returns:
        The number of weights to keep, by layer.
    """
    kept = {name: limit.least for name, limit in limits.items()}
    steps: dict[float, dict[str, int]] = {}
    for name, curve in curves.items():
        limit = limits[name]
        for (start, high), (end, low) in pairwise(curve):
            weights = min(end, limit.most) - max(start, limit.least)
            if weights > 0:
                step = steps.setdefault((high - low) / (end - start), {})
                step[name] = step.get(name, 0) + weights
    left = budget - sum(kept.values())
    for slope in sorted(steps, reverse=True):
        taken = steps[slope]
        if sum(taken.values()) > left:
            # Too few for all layers of this slope: they share the rest. Common where the curves are flat.
            taken = fill(taken, {name: Limits(0, weights) for name, weights in taken.items()}, left)
        for name, count in taken.items():
            kept[name] += count
        left -= sum(taken.values())
    return kept


def allocate(
    method: str,
    model: MobileNetV2,
    layers: Sequence[LayerStatistics],
    limits: dict[str, Limits],
    budget: int,
    curves: dict[str, Curve] | None = None,
) -> dict[str, int]:
    """Return how many weights each layer keeps by one of METHODS; they sum to the budget.

    Args:
        method: one of METHODS.
        model: a float model.
        layers: statistics of its prunable layers.
        limits: by layer; for "sensitivity" from `measured_limits`.
        budget: from `weight_budget`.
        curves: from `loss_curves`, for "sensitivity" only.
    """
    match method:
        case "uniform":
            return uniform(layers, limits, budget)
        case "erk":
            return erk(layers, limits, budget)
        case "global":
            return global_magnitude(model, limits, budget)
        case "lamp":
            return lamp(model, limits, budget)
        case "sensitivity":
            assert curves is not None
            return sensitivity(curves, limits, budget)
    raise ValueError(f"the method {method!r} is not one of {METHODS}")


def fill(shares: Mapping[str, float], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Divide `budget` into integers proportional to `shares`, within the limits.

    Where a limit changes a layer's number, the others make up the difference in proportion. Fractions are
    rounded by the largest-remainder method.

    Args:
        shares: positive numbers by layer.
        limits: for the same layers.
        budget: between the sums of the limits.
    """
    share = np.array([shares[name] for name in limits], dtype=np.float64)
    least = np.array([limit.least for limit in limits.values()], dtype=np.float64)
    most = np.array([limit.most for limit in limits.values()], dtype=np.float64)
    low, high = 0.0, float((most / share).max())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if np.clip(share * middle, least, most).sum() < budget:
            low = middle
        else:
            high = middle
    exact = np.clip(share * high, least, most)
    counts = np.floor(exact)
    missing = budget - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return {name: int(count) for name, count in zip(limits, counts, strict=True)}


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

    Fractions near a half weight, where rounding could go either way, are avoided.
    """
    for decimals in range(1, 18):
        ratio = round(kept / total, decimals)
        if abs(ratio * total - kept) < 0.25 and kept_count(total, ratio) == kept:
            return ratio
    return kept / total


def _rising(points: dict[int, float]) -> Curve:
    """Sort the points by count, and raise each loss to the largest at any higher count."""
    counts = sorted(points, reverse=True)
    losses = accumulate((points[count] for count in counts), max)
    return list(zip(counts, losses, strict=True))[::-1]


def _interpolated(curve: Curve, weight: Tensor) -> Curve:
    """Add points whose loss is linear in the sum of the squared pruned weights."""
    squares = np.sort(weight.double().square().flatten().numpy())
    pruned_by_count = np.append(0.0, squares.cumsum())[::-1]
    denser = []
    for (start, high), (end, low) in pairwise(curve):
        denser.append((start, high))
        span = pruned_by_count[start] - pruned_by_count[end]
        inner = np.linspace(start, end, POINTS_BETWEEN + 2)[1:-1].astype(int)
        for count in sorted(set(inner.tolist()) - {start, end}):
            share = (pruned_by_count[count] - pruned_by_count[end]) / span if span else 0.0
            denser.append((count, float(low + (high - low) * share)))
    return [*denser, curve[-1]]


def _convex(points: Curve) -> Curve:
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
