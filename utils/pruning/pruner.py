"""Fine-grained magnitude pruning (Han et al., 2015, https://arxiv.org/abs/1506.02626)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.statistics import prunable_layers
from utils.common.errors import UserError


def kept_count(total: int, keep_ratio: float) -> int:
    """Return how many of `total` weights are kept, rounded as in torch.nn.utils.prune."""
    return total - round((1 - keep_ratio) * total)


def magnitude_mask(weight: Tensor, keep_ratio: float, among: Tensor | None = None) -> Tensor:
    """Return the mask of the `kept_count` weights of largest magnitude (True: kept).

    Among equal magnitudes, the first in the order of `weight.flatten()` are kept.

    Args:
        weight: in any shape, without NaN.
        keep_ratio: fraction to keep, in [0, 1].
        among: mask of the same shape; weights that are False there are pruned before all others.
    """
    magnitude = weight.detach().flatten().abs()
    if among is not None:
        magnitude = magnitude.masked_fill(~among.flatten(), -1.0)
    order = magnitude.argsort(descending=True, stable=True)
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    mask[order[: kept_count(len(magnitude), keep_ratio)]] = True
    return mask.view(weight.shape)


@dataclass(frozen=True)
class CubicRamp:
    """Gradual pruning (Zhu & Gupta, 2017, https://arxiv.org/abs/1710.01878, equation 1).

    The fraction pruned grows to its target over `steps` optimizer steps, fast at first, while many weights
    are redundant, then ever more slowly. Masks are recomputed every `every` steps.
    """

    steps: int
    every: int

    def keep_ratio(self, target: float, step: int, initial: float = 1.0) -> float:
        """Return the fraction kept after `step` steps, from `initial` at the start to `target` at the end."""
        if step >= self.steps or initial <= target:
            return target
        return target + (initial - target) * (1 - step / self.steps) ** 3

    def is_due(self, step: int) -> bool:
        """Return whether to recompute the masks after `step` steps."""
        return step == self.steps or (step < self.steps and step % self.every == 0)


class FineGrainedPruner:
    """Keep the weights of largest magnitude in each layer and hold all others at exactly zero.

    `step` undoes what the optimizer did to a pruned weight (momentum, weight decay). `apply` also prunes a
    copy of the model, such as its moving average. The state belongs in the checkpoint of a training run.

    Args:
        model: a float32 model. `apply` and `step` prune its weights; creating the pruner does not.
        keep_ratios: fraction of the weights to keep, by layer. Layers that are not named are left alone.
        ramp: recomputes the masks during training; without it they are final from the start. A model that
            is already pruned keeps its zeros, unless a layer has more than its ratio asks for.

    Raises:
        KeyError: the model has no such convolution or linear layer.
        ValueError: a ratio is outside [0, 1].
        UserError: a weight is NaN.
    """

    def __init__(
        self, model: nn.Module, keep_ratios: dict[str, float], ramp: CubicRamp | None = None
    ) -> None:
        if not all(0 <= keep_ratio <= 1 for keep_ratio in keep_ratios.values()):
            raise ValueError("a keep ratio is outside [0, 1]")
        layers = prunable_layers(model)
        self.model = model
        self.keep_ratios = dict(keep_ratios)
        self.ramp = ramp
        self.steps = 0
        self.masks = {name: torch.ones_like(layers[name].weight, dtype=torch.bool) for name in keep_ratios}
        self._initial = {name: _density(layers[name].weight) for name in keep_ratios}
        self._bits: dict[str, Tensor] = {}
        self._renew_masks()

    @classmethod
    def from_zeros(cls, model: nn.Module) -> "FineGrainedPruner":
        """Return a pruner that keeps the zeros of a model that is already pruned."""
        return cls(model, {name: _density(layer.weight) for name, layer in prunable_layers(model).items()})

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Set the pruned weights to +0.0 in the model, or in another one with layers of the same names."""
        model = self.model if model is None else model
        for name, bits in self._bits.items():
            # Multiplying by the mask would give -1.0 * 0 = -0.0 and NaN * 0 = NaN. Clearing all bits always
            # gives +0.0, and is much faster than masked_fill_.
            model.get_parameter(f"{name}.weight").view(torch.int32).bitwise_and_(bits)

    def step(self) -> None:
        """Recompute the masks if they are due and apply them; call this after each optimizer step."""
        self.steps += 1
        if self.ramp is not None and self.ramp.is_due(self.steps):
            self._renew_masks()
        self.apply()

    def kept(self) -> dict[str, int]:
        """Return how many weights each layer keeps now."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the step count, the masks, and where the ramp starts and ends."""
        return {
            "steps": self.steps,
            "masks": dict(self.masks),
            "initial": dict(self._initial),
            "keep_ratios": dict(self.keep_ratios),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the `state_dict` of a pruner with the same targets.

        Raises:
            UserError: the targets differ.
            ValueError: the masks are those of another model.
        """
        if state["keep_ratios"] != self.keep_ratios:
            raise UserError(
                "the fractions to keep differ from those that the run began with: "
                "give the same --sparsity_dict, or start again with --force"
            )
        shapes = [
            {name: mask.shape for name, mask in masks.items()} for masks in (state["masks"], self.masks)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError("the masks are those of another model")
        self._set_masks(state["masks"])
        self.steps, self._initial = state["steps"], state["initial"]

    def _renew_masks(self) -> None:
        masks = {}
        for name, mask in self.masks.items():
            keep_ratio = self.keep_ratios[name]
            if self.ramp is not None:
                keep_ratio = self.ramp.keep_ratio(keep_ratio, self.steps, self._initial[name])
            weight = self.model.get_parameter(f"{name}.weight")
            if weight.isnan().any():
                raise UserError(
                    f"{name} cannot be pruned because its weights contain NaN: was --lr too high?"
                )
            masks[name] = magnitude_mask(weight, keep_ratio, among=mask)
        self._set_masks(masks)

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            weight = self.model.get_parameter(f"{name}.weight")
            self.masks[name] = mask = mask.to(weight.device)
            # All bits set for a kept weight, none for a pruned one; same memory format as the weight.
            bits = torch.zeros_like(weight, dtype=torch.int32)
            self._bits[name] = bits.masked_fill_(mask, -1)


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / weight.numel()
