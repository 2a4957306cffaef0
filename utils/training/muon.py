"""Muon: momentum SGD whose matrix updates are orthogonalized."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = {torch.float32: (5,), torch.bfloat16: (3, 2)}
"""Numbers of steps that are taken together, by dtype; five in all."""
MATRIX_MOMENTUM = 0.95
IMAGE_CHANNELS = 3


class Muon(torch.optim.SGD):
    """Muon for the groups that say `orthogonalize`, SGD with Nesterov momentum for the others.

    Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/). torch.optim.Muon takes
    only two-dimensional parameters; here a convolution's weight (out, in, y, x) is treated as the matrix
    (out, in * y * x), and one optimizer (one schedule, one state) updates everything.

    Args:
        groups: parameter groups, each with a boolean `orthogonalize`.
        dtype: float32 or bfloat16, in which updates are orthogonalized.
        options: as for torch.optim.SGD.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; replaces the gradients of the orthogonalized groups by their updates."""
        for group in self.param_groups:
            if group["orthogonalize"]:
                self._orthogonalize([p for p in group["params"] if p.grad is not None])
        return super().step(closure)

    def _orthogonalize(self, parameters: list[nn.Parameter]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for alike in by_shape.values():
            updates = torch.stack([self._update(parameter) for parameter in alike])
            # Taller matrices move as far for each of their inputs as wide ones do.
            scale = max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
            for parameter, update in zip(alike, orthogonalize(updates, self.dtype) * scale, strict=True):
                gradient_of(parameter).copy_(update.view_as(parameter))

    def _update(self, parameter: nn.Parameter) -> Tensor:
        """Return the gradient with Nesterov momentum, as a matrix."""
        state, gradient = self.state[parameter], gradient_of(parameter)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MATRIX_MOMENTUM)
        return gradient.lerp(momentum, MATRIX_MOMENTUM).flatten(1)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrices (…, m, n) with their singular values brought near 1 by five Newton-Schulz steps.

    The singular values end between 0.7 and 1.2, which works as well as 1 and takes fewer steps.

    Args:
        matrices: all matrices of one shape, since a batch is faster than one at a time.
        dtype: float32 or bfloat16, used for the computation.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for steps in NEWTON_SCHULZ_STEPS[dtype]:
        x = _step_together(x, steps)
    return (x.mT if is_tall else x).to(matrices.dtype)


def _step_together(x: Tensor, steps: int) -> Tensor:
    """Take `steps` Newton-Schulz steps on wide matrices.

    Each multiplies x by a polynomial of x @ x.T, and all of these commute: the steps are taken on the
    small square matrix, and x is multiplied once. Rounding errors grow with each step; bfloat16
    tolerates three.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product: Any = None
    for step in range(steps):
        factor = torch.add(b * gram, gram @ gram, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ (factor @ gram)
    return product @ x


def is_orthogonalized(parameter: nn.Parameter) -> bool:
    """Return whether a weight belongs to a convolution that mixes many channels.

    Depthwise filters see one channel and the stem three, too few to orthogonalize.
    """
    return parameter.ndim == 4 and parameter.shape[1] > IMAGE_CHANNELS
