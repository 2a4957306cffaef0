"""What pruning one layer alone does to the accuracy, and what follows from it.

Han et al., 2015 (https://arxiv.org/abs/1506.02626) choose each layer's threshold by such a scan.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import nn

from models.statistics import prunable_layers
from utils.common import distributed
from utils.data.loader import Batches
from utils.evaluation import Evaluation, evaluate
from utils.pruning.prefix_evaluation import PrefixEvaluator
from utils.pruning.pruner import FineGrainedPruner

Point = tuple[str, float]
"""A layer and the fraction of its weights that is kept while all other layers are whole."""


def scan_plan(model: nn.Module, keep_ratios: Sequence[float]) -> list[Point]:
    """What a scan measures: the layers in forward order, each from its smallest fraction up."""
    return [(name, keep_ratio) for name in prunable_layers(model) for keep_ratio in sorted(set(keep_ratios))]


def measure(model: nn.Module, batches: Batches, plan: Sequence[Point]) -> Iterator[Evaluation]:
    """Evaluate the model with one layer pruned, for each point of the plan in its order.

    Counts are those of `evaluate_with_pruned_layer`, and so is the loss to LOSS_DECIMALS; the way
    there is shorter (utils/pruning/prefix_evaluation.py). The points of a layer end together. The processes
    of torchrun share the layers, and each gets all results.

    Between two results, and after an error, the model's weights are what they were, bit for bit.

    Raises:
        ValueError: the batches are not those of a whole split in its order.
    """
    evaluator = PrefixEvaluator(model, batches)
    layers = [
        (name, [keep_ratio for _, keep_ratio in points])
        for name, points in groupby(plan, key=lambda point: point[0])
    ]
    # Neighbours cost about the same, so no process waits long for the others.
    for first in range(0, len(layers), distributed.world_size()):
        evaluations: list[Evaluation] = []
        for name, keep_ratios in layers[first:][distributed.rank() : distributed.rank() + 1]:
            variants = [partial(pruned_layer, model, name, keep_ratio) for keep_ratio in keep_ratios]
            evaluations = evaluator.evaluate_variants(name, variants)
        for of_process in distributed.gather(evaluations):
            yield from of_process


def evaluate_with_pruned_layer(
    model: nn.Module, batches: Batches, name: str, keep_ratio: float
) -> Evaluation:
    """Prune the layer as prune.py does, run the whole split, restore the layer bit for bit."""
    with pruned_layer(model, name, keep_ratio):
        return evaluate(model, batches)


@contextmanager
def pruned_layer(model: nn.Module, name: str, keep_ratio: float) -> Iterator[None]:
    """Prune the layer for the time of the block."""
    weight = model.get_submodule(name).weight
    original = weight.detach().clone()
    try:
        FineGrainedPruner(model, {name: keep_ratio}).apply()
        yield
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
