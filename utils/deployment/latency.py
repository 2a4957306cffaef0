"""Inference latency of several models, measured under the same conditions."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.common.tables import format_table


@dataclass(frozen=True)
class Latency:
    """Latencies of one model: one per round in ms, each for a batch of `batch_size` images."""

    batch_size: int
    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Return the median per batch."""
        return float(np.median(self.times_ms))

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile per batch, linearly interpolated."""
        return float(np.percentile(self.times_ms, percent))

    def speedup_over(self, other: "Latency") -> float:
        """Return the speed-up over `other`, measured in the same rounds.

        It is the median of the per-round ratios, not the ratio of the medians: whatever slows down
        a whole round (another program, the clock) cancels out.
        """
        return float(np.median(np.divide(other.times_ms, self.times_ms)))


def measure_fastest_forms(
    models: Mapping[str, Mapping[str, Callable[[Tensor], object]]],
    inputs: Tensor,
    rounds: int,
    warm_up: int,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[str, Latency]]:
    """Time models in interleaved rounds, so that all of them see the same conditions.

    Each round calls every form of every model twice and times the second call; the first brings its weights
    back into the caches, from which the other models evicted them. Garbage collection is off meanwhile.

    Args:
        models: by name; each is one or more forms of a model by name, which map `inputs` to anything.
        inputs: a batch (N, ...).
        rounds: number of timed calls of each form, at least 1.
        warm_up: number of untimed calls of each form before the first round, in which TorchScript compiles.
        before: called with a model's name before its calls, untimed, for example to select its engine.

    Returns:
        For each model, the name and the latency of the form with the lowest median.
    """
    times_ms: dict[tuple[str, str], list[float]] = {
        (name, form): [] for name, forms in models.items() for form in forms
    }
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for name, form in times_ms:
                before(name)
                for _ in range(warm_up):
                    models[name][form](inputs)
            for _ in range(rounds):
                for (name, form), times in times_ms.items():
                    before(name)
                    model = models[name][form]
                    model(inputs)
                    start = time.perf_counter()
                    model(inputs)
                    times.append(1000 * (time.perf_counter() - start))
    finally:
        if was_collecting:
            gc.enable()
    fastest: dict[str, tuple[str, Latency]] = {}
    for (name, form), times in times_ms.items():
        latency = Latency(len(inputs), tuple(times))
        if name not in fastest or latency.median_ms < fastest[name][1].median_ms:
            fastest[name] = (form, latency)
    return fastest


def format_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Lay out measurements as a table.

    Args:
        rows: values by key.
        columns: by header, the key of a value and how to format it, such as "{:.3f}".
    """
    cells = [[form.format(row[key]) for key, form in columns.values()] for row in rows]
    table = format_table(list(columns), cells)
    if any(row.get("p90_latency_ms", 0) > 2 * row.get("median_latency_ms", 0) for row in rows):
        table += "\n\nnote: p90 is more than twice the median: other programs disturbed the timing, repeat it"
    return table
