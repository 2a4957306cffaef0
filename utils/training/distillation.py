"""Training on a teacher's answers as well as on the labels (Hinton et al., 2015).

https://arxiv.org/abs/1503.02531
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from utils.training.loop import LossFunction


class Ensemble(nn.Module):
    """Several models that answer as one: the mean of their logits."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the mean of the members' logits (N, classes)."""
        return torch.stack([member(x) for member in self.members]).mean(0)


def distillation(
    teacher: nn.Module, loss_function: LossFunction, distill_weight: float, temperature: float
) -> LossFunction:
    """Return `loss_function` mixed with the distance to the teacher's softened answers.

    The teacher's part is the Kullback-Leibler divergence at `temperature`, times the square of the
    temperature, so that the shares of the two gradients do not depend on it.

    Args:
        teacher: in eval mode; it is called with the same augmented images as the model.
        distill_weight: share of the teacher's part; the rest is the share of `loss_function`.
    """

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = log_softmax(teacher(images) / temperature, 1)
        own = log_softmax(logits / temperature, 1)
        distance = kl_div(own, answers, reduction="batchmean", log_target=True) * temperature**2
        return distill_weight * distance + (1 - distill_weight) * loss_function(images, logits, labels)

    return loss
