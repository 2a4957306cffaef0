"""Measure what pruning one layer alone does to the accuracy.

Han et al., 2015 (https://arxiv.org/abs/1506.02626) choose each layer's threshold by such a scan.

The results are those of `evaluate`, in less time: the layers of a block are evaluated together, so that the
blocks before it run only once for all of them, and the network runs with its batch norms folded. The logits
then differ from the model's by float rounding; the size of the difference is measured for each pruned layer
on PROBES images. A batch in which the two best classes of an image are too close for that runs again through
the model itself, and so does the whole split if the difference could change a decimal of the loss.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import MobileNetV2
from models.folding import fold_batch_norms
from models.statistics import prunable_layers
from utils.checkpoints.weights import Weights
from utils.common import distributed
from utils.common.devices import device_of, on_device
from utils.data.datasets import Split
from utils.data.loader import Loader
from utils.evaluation import Evaluation, evaluate
from utils.pruning.pruner import FineGrainedPruner
from utils.pruning.scanning_log import LOSS_DECIMALS, Point

PROBES = 32
MARGIN_SAFETY = 8.0
"""How many times the largest difference on the probes two logits must be apart for their order to be sure."""


def scan_plan(model: nn.Module, keep_ratios: Sequence[float]) -> list[Point]:
    """List what a scan measures: the layers in forward order, each from its smallest fraction up."""
    return [(name, keep_ratio) for name in prunable_layers(model) for keep_ratio in sorted(set(keep_ratios))]


def scan_id(weights: Weights, split: Split) -> str:
    """Return a fingerprint of everything that a measured accuracy depends on."""
    model = weights.model
    digest = hashlib.sha256(json.dumps(model.architecture, sort_keys=True).encode())
    digest.update(repr(weights.normalization).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(value))
    digest.update(_bytes(split.images.permute(0, 2, 3, 1)))
    digest.update(_bytes(split.labels))
    return digest.hexdigest()[:12]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).numpy().data.cast("B")


def measure(model: MobileNetV2, batches: Loader, plan: Sequence[Point]) -> Iterator[Evaluation]:
    """Evaluate the model with one layer pruned, for each point of the plan in its order.

    Counts, and the loss to LOSS_DECIMALS, equal those of `evaluate_with_pruned_layer`. The points of a block
    end together. Under torchrun the processes share the blocks, and each gets all results.

    Raises:
        ValueError: the batches are not those of a whole split in its order.
    """
    is_limited = batches.drop_last or batches.limit is not None
    if batches.shuffle or batches.sharded or is_limited or batches.augment != "none":
        raise ValueError("the batches are not those of a whole split in its order")
    folded = fold_batch_norms(model)
    network = nn.Sequential(*folded.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *folded.classifier)
    model = copy.deepcopy(model).eval()
    blocks = [list(points) for _, points in groupby(plan, key=lambda point: point[0].split(".")[:2])]
    # Neighbours cost about the same, so no process waits long for the others.
    for first in range(0, len(blocks), distributed.world_size()):
        evaluations: list[Evaluation] = []
        for points in blocks[first:][distributed.rank() : distributed.rank() + 1]:
            evaluations = _evaluate_block(model, network, batches, points)
        for of_process in distributed.gather(evaluations):
            yield from of_process


def evaluate_with_pruned_layer(
    model: MobileNetV2, batches: Loader, name: str, keep_ratio: float
) -> Evaluation:
    """Prune the layer in a copy of the model, as prune.py does, and evaluate the copy."""
    pruned = copy.deepcopy(model)
    FineGrainedPruner(pruned, {name: keep_ratio}).apply()
    return evaluate(pruned, batches)


@torch.inference_mode()
def _evaluate_block(
    model: MobileNetV2, network: nn.Sequential, batches: Loader, points: Sequence[Point]
) -> list[Evaluation]:
    """Evaluate the model at each of `points`, whose layers are in one block.

    Args:
        model: in eval mode.
        network: the same with its batch norms folded, one module per block.
        batches: of the whole split.
        points: to evaluate.
    """
    index = len(network) - 1 if points[0][0].startswith("classifier") else int(points[0][0].split(".")[1])
    pruned = [_PrunedLayer(model, network[index:], index, *point) for point in points]
    for images, labels in on_device(batches, device_of(model)):
        entering = network[:index](images)
        for layer in pruned:
            layer.add(images, entering, labels)
    return [
        layer.evaluation() or evaluate_with_pruned_layer(model, batches, *point)
        for point, layer in zip(points, pruned, strict=True)
    ]


class _PrunedLayer:
    """The model and the end of the folded network, both with one layer pruned, and their answers.

    Args:
        model: in eval mode.
        suffix: the folded network from the layer's block on.
        index: of this block in the network.
    """

    def __init__(
        self, model: MobileNetV2, suffix: nn.Sequential, index: int, name: str, keep_ratio: float
    ) -> None:
        mask = FineGrainedPruner(model, {name: keep_ratio}).masks[name]
        inner = name.split(".")[2:] if name.startswith("features") else []
        folded_name = ".".join([str(index), *inner])
        self.model, self.suffix = model, suffix
        self.weight, self.folded_weight = (
            {f"{path}.weight": module.get_parameter(f"{path}.weight").masked_fill(~mask, 0.0)}
            for module, path in ((model, name), (suffix, folded_name))
        )
        self.answers: list[tuple[Tensor, Tensor]] = []
        self.differences = torch.zeros(0)

    def add(self, images: Tensor, entering: Tensor, labels: Tensor) -> None:
        """Classify a batch.

        Args:
            images: (N, 3, H, W).
            entering: what enters the block for these images.
            labels: (N,).
        """
        logits = functional_call(self.suffix, self.folded_weight, (entering,))
        if not len(self.differences):
            own = self._own_logits(images[:PROBES])
            # Some may agree by chance; no difference is taken to be below the precision of a logit.
            smallest = torch.finfo(own.dtype).eps * own.abs().max().item()
            self.differences = (logits[:PROBES] - own).abs().clamp(min=smallest)
        best = logits.topk(min(2, logits.shape[1])).values
        # Not `<=`, so that NaN is unsure as well.
        if not (best[:, 0] - best[:, -1] > MARGIN_SAFETY * self.differences.max()).all():
            logits = self._own_logits(images)
        self.answers.append((logits, labels))

    def _own_logits(self, images: Tensor) -> Tensor:
        return functional_call(self.model, self.weight, (images,))

    def evaluation(self) -> Evaluation | None:
        """Return what `evaluate` gives of the pruned model; None if its loss could round otherwise."""
        evaluation = evaluate(nn.Identity(), self.answers)
        logits, labels = map(torch.cat, zip(*self.answers, strict=True))
        losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        # Were all logits off by as much as on the probes, all in the direction that counts: about ten
        # times what is found. `evaluate` adds up a batch in float32.
        slack = (2 * (1 - torch.exp(-losses)).mean() * self.differences.square().mean().sqrt()).item()
        slack += torch.finfo(torch.float32).eps * evaluation.loss
        low, high = (round(evaluation.loss + sign * slack, LOSS_DECIMALS) for sign in (-1, 1))
        return evaluation if low == high else None
