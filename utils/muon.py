"""Muon: momentum SGD whose matrix updates are orthogonalized."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MATRIX_MOMENTUM = 0.95


class Muon(torch.optim.SGD):
    """Muon for the groups that say `orthogonalize`, SGD with Nesterov momentum for the others.

    Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/). torch.optim.Muon takes
    two-dimensional parameters alone; here a pointwise convolution's (out, in, 1, 1) is the matrix
    that it computes with, and one optimizer (one schedule, one state) steps everything.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; the gradients of the orthogonalized groups are replaced by their updates."""
        for group in self.param_groups:
            if not group["orthogonalize"]:
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                momentum = state["momentum"].lerp_(gradient, 1 - MATRIX_MOMENTUM)
                update = gradient.lerp(momentum, MATRIX_MOMENTUM).flatten(1)
                # Taller matrices move as far for each of their inputs as wide ones do.
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                gradient.copy_(orthogonalize(update).mul_(scale).view_as(gradient))
        return super().step(closure)


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest matrix (m, n) with singular values of about 1, by five Newton-Schulz steps.

    They come to lie between 0.7 and 1.2, which serves as well as 1 and takes fewer steps.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    # Every step multiplies x by a polynomial of x @ x.T, and all of these commute: the steps are
    # taken on the small square matrix, and x is multiplied once.
    gram = x @ x.T
    product = None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < NEWTON_SCHULZ_STEPS:
            gram = factor @ (factor @ gram)
    x = product @ x
    return x.T if is_tall else x


def is_pointwise(parameter: nn.Parameter) -> bool:
    """Whether a weight is that of a pointwise convolution."""
    return parameter.ndim == 4 and parameter.shape[2:] == (1, 1)
