"""What pruning one layer alone does to the accuracy, and what follows from it.

Han et al., 2015 (https://arxiv.org/abs/1506.02626) choose each layer's threshold by such a scan.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from utils.batches import Batches
from utils.evaluation import Evaluation, evaluate
from utils.model_statistics import prunable_layers
from utils.pruner import FineGrainedPruner

Point = tuple[str, float]
"""A layer and the fraction of its weights that is kept while all other layers are whole."""


def scan_plan(model: nn.Module, keep_ratios: Sequence[float]) -> list[Point]:
    """What a scan measures: the layers in forward order, each from its smallest fraction up."""
    return [(name, keep_ratio) for name in prunable_layers(model) for keep_ratio in sorted(set(keep_ratios))]


def measure(model: nn.Module, batches: Batches, plan: Sequence[Point]) -> Iterator[Evaluation]:
    """Evaluate the model with one layer pruned, for each point of the plan in its order.

    Between two results, and after an error, the model's weights are what they were, bit for bit.
    """
    for name, keep_ratio in plan:
        yield evaluate_with_pruned_layer(model, batches, name, keep_ratio)


def evaluate_with_pruned_layer(
    model: nn.Module, batches: Batches, name: str, keep_ratio: float
) -> Evaluation:
    """Prune the layer as prune.py does, evaluate, restore it bit for bit."""
    weight = model.get_submodule(name).weight
    original = weight.detach().clone()
    try:
        FineGrainedPruner(model, {name: keep_ratio}).apply()
        return evaluate(model, batches)
    finally:
        with torch.no_grad():
            weight.copy_(original)


def recommend(keep_ratios: Sequence[float], accuracies_pct: Sequence[float], threshold_pct: float) -> float:
    """The smallest fraction kept whose accuracy is at or above the threshold, else 1.0."""
    passing = [
        keep_ratio
        for keep_ratio, accuracy_pct in zip(keep_ratios, accuracies_pct, strict=True)
        if accuracy_pct >= threshold_pct
    ]
    return min(passing, default=1.0)
