"""Evaluates models that differ in one layer each, with the result of `evaluate` and in less time.

- Layers are taken in forward order, and the activations that enter a block are kept, so that only
  what lies behind the changed layer runs again.
- The network runs in its folded form (utils/pruning/folded_network.py), whose logits differ from the
  model's by float rounding; by how much is measured for each variant, on probe images. A batch with
  an image whose two best classes are not clearly further apart than that runs again through the
  model itself, and so does the whole split if the loss could be rounded to another number.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from models import MobileNetV2
from utils.common.devices import device_of
from utils.data.loader import Batches
from utils.evaluation import Evaluation, evaluate
from utils.pruning.folded_network import FoldedLayer, fold_network

LOSS_DECIMALS = 4
"""Of the mean loss in nats, which both ways give alike."""
KEPT_BYTES = 2**28
"""Of activations; what does not fit is computed again. Beside them run a batch of `evaluate` and a chunk:
with batches of 250 images of 32x32 a scan stays below 2 GiB over the images, however many they are."""
CHUNK_BYTES = 2**26
"""Of the activations between two blocks, for each variant of the layer."""
LARGEST_CHUNK = 64
"""Images; more do not make the matrix products faster."""
FEWEST_PROBES, MOST_PROBES = 8, 32
"""Images; between them, one of a hundred."""
MARGIN_SAFETY = 8.0
"""Times the largest error of a logit on the probes."""

Variant = Callable[[], AbstractContextManager[None]]
"""Makes a with-block in which a layer of the model has other weights."""


class PrefixEvaluator:
    """Evaluates a model on a split with one layer changed at a time.

    Args:
        model: of float weights.
        batches: of a whole split in its order.

    Raises:
        ValueError: the batches are shuffled, augmented, sharded or leave images out.
    """

    def __init__(self, model: MobileNetV2, batches: Batches) -> None:
        is_limited = batches.drop_last or batches.limit is not None
        if batches.shuffle or batches.sharded or is_limited or batches.augment != "none":
            raise ValueError("the batches are not those of a whole split in its order")
        self.model, self.batches = model, batches
        self.blocks = fold_network(model)
        self.block_of = {name: i for i, block in enumerate(self.blocks) for name in block.layers}
        # A chunk's activations and the block they enter, by its first image.
        self.kept: dict[int, tuple[int, Tensor]] = {}
        self.kept_bytes = 0
        self.chunk_size = self._chunk_size()

    def evaluate_variants(self, name: str, variants: Sequence[Variant]) -> list[Evaluation]:
        """What `evaluate` gives of the model with each variant of the layer.

        Counts are equal, and the loss is once it is rounded to LOSS_DECIMALS. Layers are best asked
        for in forward order.
        """
        layer = self.blocks[self.block_of[name]].layers[name]
        layers = []
        for variant in variants:
            with variant():
                layers.append(layer.folded_anew())
        evaluations = []
        for variant, logits in zip(variants, self._logits(name, layers), strict=True):
            with variant():
                evaluations.append(self._evaluation(logits))
        return evaluations

    @torch.inference_mode()
    def _logits(self, name: str, layers: Sequence[FoldedLayer]) -> Tensor:
        """Logits (variants, N, classes) of the folded network."""
        index = self.block_of[name]
        chunks = []
        for first in range(0, len(self.batches.split), self.chunk_size):
            outputs = self.blocks[index].with_variants(self._entering(index, first), name, layers)
            x = torch.cat(outputs)
            for block in self.blocks[index + 1 :]:
                x = block(x)
            chunks.append(x.view(len(layers), -1, x.shape[-1]))
        return torch.cat(chunks, 1)

    def _entering(self, index: int, first: int) -> Tensor:
        """What enters block `index` for the chunk that begins with image `first`."""
        start, x = self.kept.get(first, (0, None))
        kept_bytes = 0 if x is None else x.nbytes
        if x is None or start > index:
            start, x = 0, self._images(torch.arange(first, first + self.chunk_size)).permute(0, 2, 3, 1)
        for block in self.blocks[start:index]:
            x = block(x)
        grown = self.kept_bytes - kept_bytes + x.nbytes
        # Images are at hand as they are.
        if index > 0 and grown <= KEPT_BYTES:
            self.kept[first], self.kept_bytes = (index, x), grown
        return x

    def _images(self, indices: Tensor) -> Tensor:
        split = self.batches.split.subset(indices[indices < len(self.batches.split)])
        (images, _), *_ = replace(self.batches, split=split, batch_size=len(split))
        return images.to(device_of(self.model))

    @torch.inference_mode()
    def _chunk_size(self) -> int:
        x = self._images(torch.tensor([0])).permute(0, 2, 3, 1)
        largest = x.nbytes
        for block in self.blocks:
            x = block(x)
            largest = max(largest, x.nbytes)
        return min(LARGEST_CHUNK, max(1, CHUNK_BYTES // largest))

    @torch.inference_mode()
    def _evaluation(self, logits: Tensor) -> Evaluation:
        """The result of the model as it is now, of which `logits` (N, classes) are close to its own."""
        total, classes = logits.shape
        split, batch_size = self.batches.split, self.batches.batch_size
        labels = split.labels.to(logits.device)
        error = self._errors(logits)

        best = logits.topk(min(2, classes)).values
        margin = best[:, 0] - best[:, -1]
        # Not `<=`: NaN is unsure as well.
        unsure = (~(margin > MARGIN_SAFETY * error.abs().max())).nonzero().flatten() // batch_size
        done_again = [
            evaluate(self.model, replace(self.batches, split=split.subset(indices)))
            for batch in unsure.unique().tolist()
            for indices in [torch.arange(batch * batch_size, min(total, (batch + 1) * batch_size))]
        ]
        is_sure = ~torch.isin(torch.arange(total, device=logits.device) // batch_size, unsure)

        losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        loss = losses[is_sure].sum().item() + sum(e.loss * e.total for e in done_again)
        loss /= total
        # Were all logits off by as much as on the probes, all in the direction that counts: about ten
        # times of what is found. `evaluate` adds up a batch in float32.
        slack = 2 * (1 - torch.exp(-losses)).mean() * error.square().mean().sqrt()
        slack = slack.item() + torch.finfo(torch.float32).eps * loss
        if round(loss - slack, LOSS_DECIMALS) != round(loss + slack, LOSS_DECIMALS):
            return evaluate(self.model, self.batches)

        is_hit = (logits.argmax(1) == labels) & is_sure
        correct_by_class = torch.bincount(labels[is_hit], minlength=classes)
        for evaluation in done_again:
            correct_by_class += torch.tensor(evaluation.correct_by_class, device=logits.device)
        total_by_class = torch.bincount(labels, minlength=classes)
        return Evaluation(
            int(correct_by_class.sum()),
            total,
            loss,
            tuple(correct_by_class.tolist()),
            tuple(total_by_class.tolist()),
        )

    def _errors(self, logits: Tensor) -> Tensor:
        """By how much some rows of `logits` differ from those of the model as it is now."""
        count = min(MOST_PROBES, max(FEWEST_PROBES, len(logits) // 100))
        probes = torch.linspace(0, len(logits) - 1, count).long()
        was_training = self.model.training
        own = self.model.eval()(self._images(probes))
        self.model.train(was_training)
        error = logits[probes.to(logits.device)] - own
        # Some may agree by chance, and a logit has no more digits than these.
        return error.abs().clamp(min=torch.finfo(own.dtype).eps * own.abs().max().item())
