"""Accuracy and loss of a model on a split."""

from dataclasses import dataclass

import torch
from torch import nn

from utils.batches import Batches


@dataclass(frozen=True)
class Evaluation:
    """Counts of right answers, in all and by class, and the mean cross-entropy an image (nats)."""

    correct: int
    total: int
    loss: float
    correct_by_class: tuple[int, ...]
    total_by_class: tuple[int, ...]

    @property
    def accuracy_pct(self) -> float:
        """Right answers in percent."""
        return 100 * self.correct / self.total


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, num_batches: int | None = None) -> Evaluation:
    """Evaluate `model` (in eval mode for the time of the call) on at most `num_batches` batches.

    Args:
        model: maps images (B, 3, H, W) to logits (B, classes); float, quantized or scripted.
    """
    was_training = model.training
    model.eval()
    losses, hits, labels_seen = [], [], []
    for index, (images, labels) in enumerate(batches):
        if index == num_batches:
            break
        logits = model(images)
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="sum").double())
        hits.append(logits.argmax(1) == labels)
        labels_seen.append(labels)
        classes = logits.shape[1]
    model.train(was_training)
    hit, label = torch.cat(hits), torch.cat(labels_seen)
    return Evaluation(
        correct=int(hit.sum()),
        total=len(hit),
        loss=(torch.stack(losses).sum() / len(hit)).item(),
        correct_by_class=tuple(torch.bincount(label[hit], minlength=classes).tolist()),
        total_by_class=tuple(torch.bincount(label, minlength=classes).tolist()),
    )
