"""The one way in which a model's layers take another form for training."""

from collections.abc import Callable
from itertools import chain, pairwise

from torch import nn

Form = Callable[[nn.Module, nn.Module], type[nn.Module] | None]
"""Gives the class that a layer takes, or None to leave it; the second argument is the layer before it."""


def recast(model: nn.Module, form: Form) -> None:
    """Let each layer of a model compute as another class says; parameters, buffers and names stay.

    Args:
        model: changed in place.
        form: chooses the class, whose instances must hold what those of the layer's present class hold.
            It is best asked for exact types: a subclass (such as those of quantization-aware training)
            has a forward of its own.
    """
    for parent in list(model.modules()):
        children = list(parent.children())
        # The first layer has none before it.
        for before, layer in pairwise(chain([parent], children)):
            chosen = form(layer, before)
            if chosen is not None:
                layer.__class__ = chosen
