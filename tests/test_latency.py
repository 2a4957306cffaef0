import gc

import numpy as np
import pytest
import torch

from utils.deployment import latency
from utils.deployment.latency import Latency, format_rows, measure_fastest_forms

INPUTS = torch.zeros(4, 3, 8, 8)


def measure_latency(models, *args, **kwargs) -> dict[str, Latency]:
    """Time models of one form each."""
    forms = {name: {"only": model} for name, model in models.items()}
    measured = measure_fastest_forms(forms, *args, **kwargs)
    return {name: measured_latency for name, (_, measured_latency) in measured.items()}


def test_every_round_runs_every_model_and_the_warm_up_comes_first():
    calls = []
    models = {name: lambda x, name=name: calls.append(name) for name in "abc"}
    measured = measure_latency(models, INPUTS, rounds=2, warm_up=3)
    assert "".join(calls) == "aaabbbccc" + "aabbcc" * 2
    assert list(measured) == ["a", "b", "c"]
    assert all(len(m.times_ms) == 2 and m.batch_size == 4 for m in measured.values())


def test_only_the_second_call_of_a_round_is_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    costs = {"a": iter([100, 50, 1, 50, 2]), "b": iter([100, 50, 4, 50, 6])}

    def model(name):
        def call(_inputs):
            clock[0] += next(costs[name])

        return call

    measured = measure_latency({n: model(n) for n in costs}, INPUTS, rounds=2, warm_up=1)
    assert measured["a"].times_ms == (1000, 2000)
    assert measured["b"].times_ms == (4000, 6000)


def test_what_a_model_depends_on_is_set_ahead_of_it_and_not_timed(monkeypatch):
    clock, seen, state = [0.0], [], [None]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def before(name):
        state[0] = name
        clock[0] += 1000

    models = {name: lambda x, name=name: seen.append((name, state[0])) for name in "ab"}
    measured = measure_latency(models, INPUTS, rounds=3, warm_up=1, before=before)
    assert len(seen) == 14
    assert all(name == setting for name, setting in seen)
    assert measured["a"].times_ms == (0, 0, 0)


def test_the_model_runs_in_inference_mode_and_without_garbage_collection():
    seen = []
    measure_latency(
        {"a": lambda x: seen.append((torch.is_inference_mode_enabled(), gc.isenabled()))}, INPUTS, 1, 1
    )
    assert seen == [(True, False)] * 3
    assert gc.isenabled()


def test_garbage_collection_is_on_again_after_an_error():
    def broken(_inputs):
        raise ValueError

    with pytest.raises(ValueError):
        measure_latency({"a": broken}, INPUTS, 1, 1)
    assert gc.isenabled()


def test_percentiles_are_numpys():
    times = np.random.default_rng(0).lognormal(size=257)
    measured = Latency(batch_size=32, times_ms=tuple(times))
    assert measured.median_ms == np.median(times)
    for percent in (90, 99):
        assert measured.percentile_ms(percent) == np.percentile(times, percent)


def test_speedup_is_the_median_of_the_rounds_own_ratios():
    slow = Latency(1, (10.0, 200.0, 30.0))
    fast = Latency(1, (5.0, 50.0, 30.0))
    assert fast.speedup_over(slow) == 2.0  # of 2, 4 and 1; the medians alone would say 1.0
    assert slow.speedup_over(slow) == 1.0


def test_of_several_forms_the_one_with_the_lowest_median_counts(monkeypatch):
    clock, running = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    # The oneDNN form is once the fastest, but not as a rule.
    costs = {"frozen": [2, 2, 2], "oneDNN": [1, 3, 3], "int8": [1, 1, 1]}
    calls = dict.fromkeys(costs, 0)

    def model(form):
        def call(_inputs):
            clock[0] += costs[form][calls[form] // 2 % 3]
            calls[form] += 1
            running.append(form)

        return call

    prepared = []
    measured = measure_fastest_forms(
        {"float": {f: model(f) for f in ("frozen", "oneDNN")}, "small": {"int8": model("int8")}},
        INPUTS,
        rounds=3,
        warm_up=0,
        before=prepared.append,
    )
    assert {name: form for name, (form, _) in measured.items()} == {"float": "frozen", "small": "int8"}
    assert measured["float"][1].times_ms == (2000, 2000, 2000)
    assert measured["small"][1].times_ms == (1000, 1000, 1000)
    assert running == ["frozen", "frozen", "oneDNN", "oneDNN", "int8", "int8"] * 3
    assert prepared[-3:] == ["float", "float", "small"]


def test_a_disturbed_timing_is_told():
    columns = {"ms": ("median_latency_ms", "{:.1f}")}
    calm = {"median_latency_ms": 1.0, "p90_latency_ms": 1.9}
    assert "disturbed" not in format_rows([calm], columns)
    assert "disturbed" in format_rows([calm, {**calm, "p90_latency_ms": 2.1}], columns)
