"""How much of each layer to keep, so that the whole model ends at an asked density.

The budget counts what `models.statistics` counts: all parameters that are not zero. Batch norms
and biases are not pruned, so what is left of the budget after them is shared out among the layers'
weights, to the weight. A weight that is zero already is not counted as kept.

Methods: `uniform`, `erk`, `global_magnitude`, `lamp`, `sensitivity`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
"""Of a layer's loss, interpolated between two measured sparsities."""


@dataclass(frozen=True)
class Limits:
    """How many weights a layer keeps: at least `least`, at most `most`."""

    least: int
    most: int


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """The layers of each of GROUPS: the first one, the depthwise convolutions, the last one."""
    layers = prunable_layers(model)
    names = list(layers)
    depthwise = [name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1]
    return dict(zip(GROUPS, ([names[0]], depthwise, [names[-1]]), strict=True))


def select_layers(selector: str, model: nn.Module) -> list[str]:
    """The layers that a name of a layer or of one of GROUPS stands for.

    Raises:
        UserError: it is neither.
    """
    groups, layers = layer_groups(model), list(prunable_layers(model))
    if selector in groups:
        return groups[selector]
    if selector in layers:
        return [selector]
    known = [*GROUPS, *layers]
    raise UserError(
        f"the model has no layer {selector!r}{suggest(selector, known)} "
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
    """What each layer may keep; where several limits name a layer, all of them hold.

    Args:
        model: whose layers these are.
        layers: statistics of the prunable layers.
        spare: layers or GROUPS that lose nothing.
        keep_at_least: (layer or group, fraction of the weights kept).
        keep_at_most: the same.
        keep_per_channel: every layer keeps at least so many weights an output channel, on average
            over the layer; what `keep_at_most` says comes first.

    Raises:
        UserError: a layer is unknown, or its limits contradict each other.
    """
    totals = {layer.name: layer.parameters for layer in layers}
    least = {layer.name: 0 for layer in layers}
    # A weight that is zero already cannot be one that is kept.
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
    """How many weights all layers keep together, for the density that is nearest to `target`.

    Args:
        target: fraction of all parameters that are to be nonzero.
        statistics: of the model as it is.
        limits: by layer.

    Raises:
        UserError: no choice within the limits has this density.
    """
    unprunable = statistics.nonzeros - sum(layer.nonzeros for layer in statistics.layers)
    nonzeros = round(target * statistics.parameters)
    smallest = unprunable + sum(limit.least for limit in limits.values())
    largest = unprunable + sum(limit.most for limit in limits.values())
    if smallest <= nonzeros <= largest:
        return nonzeros - unprunable
    # Rounded inwards, so that the number given here works.
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
    """The same fraction of each layer, as far as its limits allow.

    Args:
        layers: statistics of the prunable layers.
        limits: by layer.
        budget: as `weight_budget` gives it.

    Returns:
        How many weights each layer keeps.
    """
    return fill({layer.name: layer.parameters for layer in layers}, limits, budget)


def erk(layers: Sequence[LayerStatistics], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Erdős–Rényi-Kernel (Evci et al., 2020, https://arxiv.org/abs/1911.11134).

    A layer's density is in proportion to the sum of its weight's dimensions over their product, so
    that the number of weights it keeps is in proportion to the sum. Layers that would be denser
    than 1 are whole, and the others share what is left. Arguments are those of `uniform`.
    """
    return fill({layer.name: sum(layer.shape) for layer in layers}, limits, budget)


def global_magnitude(model: MobileNetV2, limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """One threshold for the magnitudes of all layers (Han et al., 2015, https://arxiv.org/abs/1506.02626).

    A convolution in front of a batch norm can be scaled at will without any change of the outputs,
    so its raw magnitudes mean nothing beside those of another layer. Compared are the weights with
    the batch norms folded in, as the model computes with them. Which weights stay in a layer is up
    to prune.py, which goes by the raw ones. The classifier has no batch norm; its small weights lose
    against all others, so it is best spared.

    Args:
        model: of float weights.
        limits: by layer.
        budget: as `weight_budget` gives it.

    Returns:
        How many weights each layer keeps.
    """
    scores = {name: weight.abs() for name, weight in folded_weights(model).items()}
    return keep_largest(scores, limits, budget)


def lamp(model: nn.Module, limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """Layer-adaptive magnitude (Lee et al., 2021, https://arxiv.org/abs/2010.07611).

    One threshold for the scores of all layers, see `lamp_scores`. Arguments are those of
    `global_magnitude`.
    """
    layers = prunable_layers(model)
    scores = {name: lamp_scores(layer.weight.detach().flatten()) for name, layer in layers.items()}
    return keep_largest(scores, limits, budget)


def lamp_scores(weight: Tensor) -> Tensor:
    """The LAMP score of each weight (n,): its square over the sum of all squares not before it.

    In the order of rising magnitude; of equal ones, the first in `weight` is last, which is the one
    that pruning keeps. A zero scores 0. Equation 3 of Lee et al., 2021.

    Returns:
        float64 (n,), in the order of `weight`; 1 for the largest weight of the layer.
    """
    squares = weight.double().square()
    falling, order = squares.sort(descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = falling / falling.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return scores


Curve = list[tuple[int, float]]
"""Points (weights kept, loss) of a layer: more weights, less loss, each slope flatter than the last."""


def loss_curves(
    model: nn.Module, layers: Sequence[LayerStatistics], measurements: Sequence[Measurement]
) -> dict[str, Curve]:
    """What each layer's loss is by the number of weights it keeps, from a scan of each layer alone.

    Near its minimum a loss grows with the square of the change of the weights. So between two
    measured sparsities it is taken to rise with the sum of the squares of the weights that are
    pruned. A loss that fell when more was pruned is raised to the larger one behind it, and points
    above the line between their neighbours are left out, which makes the curve convex.

    Args:
        model: that was scanned.
        layers: statistics of its prunable layers.
        measurements: all rows of a scan of these layers. Without one at sparsity 1, the smallest
            loss of all stands for that of the whole model.
    """
    whole = [row.loss for row in measurements if row.keep_ratio == 1]
    base = min(whole or [row.loss for row in measurements])
    curves, layers_by_name = {}, prunable_layers(model)
    for layer in layers:
        points = {layer.nonzeros: base}
        for row in measurements:
            if row.layer == layer.name and row.keep_ratio < 1:
                # Of a layer that was pruned before the scan, nothing more goes at some sparsities.
                count = min(kept_count(layer.parameters, row.keep_ratio), layer.nonzeros)
                points[count] = max(row.loss, points.get(count, base))
        weight = layers_by_name[layer.name].weight.detach()
        curves[layer.name] = _convex(_interpolated(_rising(points), weight))
    return curves


def measured_limits(limits: dict[str, Limits], curves: dict[str, Curve]) -> dict[str, Limits]:
    """Limits that reach no further down than the curves; below them nothing is known."""
    return {
        name: Limits(max(limit.least, min(limit.most, curves[name][0][0])), limit.most)
        for name, limit in limits.items()
    }


def sensitivity(curves: dict[str, Curve], limits: dict[str, Limits], budget: int) -> dict[str, int]:
    """What costs the least loss by a scan of each layer alone (Han et al., 2015, section 3.1).

    The increases of the loss that the layers cause alone are taken to add up. As the curves are
    convex, the sum is least when every weight goes where a curve is steepest.

    Args:
        curves: as `loss_curves` gives them.
        limits: of `measured_limits`.
        budget: as `weight_budget` gives it.

    Returns:
        How many weights each layer keeps.
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
            # Layers of one slope share what is too little for all; above all those without an effect.
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
    """How many weights each layer keeps, by one of METHODS.

    Args:
        method: one of METHODS.
        model: of float weights.
        layers: statistics of the prunable layers.
        limits: by layer.
        budget: as `weight_budget` gives it; what comes back sums to it.
        curves: for "sensitivity", as `loss_curves` gives them.
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
    """Whole numbers in proportion to `shares`, within the limits, that sum to `budget`.

    What a layer cannot take, or must have beyond its share, is made up by the others in proportion.
    Fractions of a weight go to the layers that miss most of one.

    Args:
        shares: above 0.
        limits: by the same names.
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
    """How many of the `budget` largest scores lie in each layer, within the limits.

    Args:
        scores: of the weights of each layer, in any shape; of equal ones the first is taken.
        limits: by layer.
        budget: between the sums of the limits.
    """
    # A layer keeps its largest in any case up to the one limit, and none beyond the other.
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
    """The fraction of fewest decimals that keeps exactly `kept` of `total` weights.

    It stays clear of the halves, where rounding could turn either way.
    """
    for decimals in range(1, 18):
        ratio = round(kept / total, decimals)
        if abs(ratio * total - kept) < 0.25 and kept_count(total, ratio) == kept:
            return ratio
    return kept / total


def _rising(points: dict[int, float]) -> Curve:
    """The points in the order of rising counts, with no loss below one at a larger count."""
    curve: Curve = []
    for count in sorted(points, reverse=True):
        curve.append((count, max(points[count], curve[-1][1]) if curve else points[count]))
    return curve[::-1]


def _interpolated(curve: Curve, weight: Tensor) -> Curve:
    """The curve with more points in between, its loss in line with the squares that are pruned."""
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
    """The lower hull of points in the order of rising counts, the loss falling or level throughout."""
    hull: Curve = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
