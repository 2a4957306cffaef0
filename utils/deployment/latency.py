"""Inference times of several models, measured so that they can be compared."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Latency:
    """Times of one model, one a round, each for a whole batch of `batch_size` images, in ms."""

    batch_size: int
    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median a batch."""
        return float(np.median(self.times_ms))

    @property
    def p90_ms(self) -> float:
        """90th percentile a batch, interpolated linearly."""
        return float(np.percentile(self.times_ms, 90))

    @property
    def p99_ms(self) -> float:
        """99th percentile a batch, interpolated linearly."""
        return float(np.percentile(self.times_ms, 99))

    @property
    def median_ms_per_image(self) -> float:
        """Median divided by the batch size."""
        return self.median_ms / self.batch_size

    @property
    def images_per_s(self) -> float:
        """Images in a second at the median."""
        return 1000 * self.batch_size / self.median_ms

    def speedup_over(self, other: "Latency") -> float:
        """How many times as fast as `other`, measured in the same rounds.

        It is the median over the rounds of the ratio of the two times, not the ratio of the two
        medians: what slows a round down (another program, the clock) then cancels out.
        """
        return float(np.median(np.divide(other.times_ms, self.times_ms)))


def measure_latency(
    models: Mapping[str, Callable[[Tensor], object]],
    inputs: Tensor,
    rounds: int,
    warm_up: int,
    before: Callable[[str], None] | None = None,
) -> dict[str, Latency]:
    """Time models in rounds that interleave them, so that all meet the same conditions.

    In a round each model is called twice, and the second call is timed: the first one only brings
    its weights back into the caches, from which the other models have pushed them.

    Args:
        models: by name; each maps `inputs` to anything.
        inputs: a batch (N, ...).
        rounds: times taken of each model, at least 1.
        warm_up: calls of each model before the first round (a scripted model is compiled then).
        before: called with a model's name, untimed, ahead of its calls; sets what it depends on.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), _no_garbage_collection():
        for name, model in models.items():
            if before:
                before(name)
            for _ in range(warm_up):
                model(inputs)
        for _ in range(rounds):
            for name, model in models.items():
                if before:
                    before(name)
                model(inputs)
                start = time.perf_counter()
                model(inputs)
                times_ms[name].append(1000 * (time.perf_counter() - start))
    return {name: Latency(len(inputs), tuple(times)) for name, times in times_ms.items()}


def measure_fastest_forms(
    models: Mapping[str, Mapping[str, Callable[[Tensor], object]]],
    inputs: Tensor,
    rounds: int,
    warm_up: int,
    before: Callable[[str], None] | None = None,
) -> dict[str, tuple[str, Latency]]:
    """As `measure_latency`, for models that can run in several forms, all timed in the same rounds.

    Args:
        models: by name; each by the names of its forms.
        inputs: as for `measure_latency`, and so are the others.

    Returns:
        The name of the form with the lowest median, and its times, of each model.
    """
    forms = [(name, form) for name, callables in models.items() for form in callables]
    measured = measure_latency(
        {str(index): models[name][form] for index, (name, form) in enumerate(forms)},
        inputs,
        rounds,
        warm_up,
        before and (lambda index: before(forms[int(index)][0])),
    )
    fastest: dict[str, tuple[str, Latency]] = {}
    for (name, form), latency in zip(forms, measured.values(), strict=True):
        if name not in fastest or latency.median_ms < fastest[name][1].median_ms:
            fastest[name] = (form, latency)
    return fastest


@contextmanager
def _no_garbage_collection():
    """A collection in the midst of a call would be counted as the model's."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
