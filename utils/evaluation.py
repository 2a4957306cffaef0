"""Accuracy and loss of a model on a data split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.common.devices import device_of, on_device
from utils.common.distributed import all_reduce_sum
from utils.common.errors import UserError


class NotFiniteError(UserError):
    """A model answers with NaN or infinity, which no file may record."""

    def __init__(self) -> None:
        super().__init__("the model answers with NaN or infinity: its weights or normalization are damaged")


@dataclass(frozen=True)
class Evaluation:
    """Counts of correct predictions, in total and by class, and the mean cross-entropy per image (nats)."""

    correct: int
    total: int
    loss: float
    correct_by_class: tuple[int, ...]
    total_by_class: tuple[int, ...]

    @property
    def accuracy_pct(self) -> float:
        """Return the top-1 accuracy in percent."""
        return 100 * self.correct / self.total


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], sharded: bool = False) -> Evaluation:
    """Evaluate `model` in eval mode, and restore its mode.

    Args:
        model: maps images (B, 3, H, W) to logits (B, classes); float, quantized or scripted. It stays
            on its device.
        batches: of images and labels (B,).
        sharded: each process of a distributed run holds one shard of each batch, so sum the counts over
            all processes. Every process must make this call.

    Raises:
        NotFiniteError: the loss is not a finite number.
    """
    was_training = model.training
    model.eval()
    losses, hits, labels_seen = [], [], []
    for images, labels in on_device(batches, device_of(model)):
        logits = model(images)
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        hits.append(logits.argmax(1) == labels)
        labels_seen.append(labels)
        classes = logits.shape[1]
    model.train(was_training)
    hit, label = torch.cat(hits).cpu(), torch.cat(labels_seen).cpu()
    loss = torch.stack(losses).cpu().double().sum()
    correct_by_class = torch.bincount(label[hit], minlength=classes)
    total_by_class = torch.bincount(label, minlength=classes)
    if sharded:
        for counted in (loss, correct_by_class, total_by_class):
            all_reduce_sum(counted)
    if not loss.isfinite():
        raise NotFiniteError
    total = int(total_by_class.sum())
    return Evaluation(
        correct=int(correct_by_class.sum()),
        total=total,
        loss=loss.item() / total,
        correct_by_class=tuple(correct_by_class.tolist()),
        total_by_class=tuple(total_by_class.tolist()),
    )
