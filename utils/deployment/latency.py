"""Inference latency of several models, measured under the same conditions."""

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
    """Latencies of one model in ms: one per round, each for a batch of `batch_size` images."""

    batch_size: int
    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median per batch."""
        return float(np.median(self.times_ms))

    @property
    def p90_ms(self) -> float:
        """90th percentile per batch, linearly interpolated."""
        return float(np.percentile(self.times_ms, 90))

    @property
    def p99_ms(self) -> float:
        """99th percentile per batch, linearly interpolated."""
        return float(np.percentile(self.times_ms, 99))

    @property
    def median_ms_per_image(self) -> float:
        """Median per image."""
        return self.median_ms / self.batch_size

    @property
    def images_per_s(self) -> float:
        """Throughput at the median."""
        return 1000 * self.batch_size / self.median_ms

    def speedup_over(self, other: "Latency") -> float:
        """Return the speed-up over `other`, measured in the same rounds.

        It is the median of the per-round ratios, not the ratio of the medians: whatever slows a whole
        round down (another program, the clock) cancels out.
        """
        return float(np.median(np.divide(other.times_ms, self.times_ms)))


def measure_latency(
    models: Mapping[str, Callable[[Tensor], object]],
    inputs: Tensor,
    rounds: int,
    warm_up: int,
    before: Callable[[str], None] | None = None,
) -> dict[str, Latency]:
    """Time models in interleaved rounds, so that all of them see the same conditions.

    Each round calls every model twice and times the second call; the first brings its weights back into
    the caches, from which the other models evicted them.

    Args:
        models: by name; each maps `inputs` to anything.
        inputs: a batch (N, ...).
        rounds: timed calls of each model, at least 1.
        warm_up: untimed calls of each model before the first round, in which TorchScript compiles.
        before: called with a model's name before its calls, untimed, such as to select its engine.
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
    """Time every form of each model in the same rounds and keep the fastest.

    Args:
        models: by name; each by the names of its forms.
        inputs, rounds, warm_up, before: as for `measure_latency`.

    Returns:
        By model, the name and the latency of the form with the lowest median.
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
    """Disable garbage collection, which would be timed as part of a call."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
