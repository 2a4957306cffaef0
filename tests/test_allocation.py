import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import MobileNetV2
from models.statistics import LayerStatistics, model_statistics, prunable_layers
from utils.common.errors import UserError
from utils.pruning.allocation import (
    METHODS,
    Limits,
    allocate,
    fill,
    folded_weights,
    keep_largest,
    lamp_scores,
    layer_limits,
    least_loss,
    loss_curves,
    shortest_keep_ratio,
    weight_budget,
)
from utils.pruning.pruner import FineGrainedPruner, kept_count, magnitude_mask
from utils.pruning.scanning_log import Measurement


def trained_like_model() -> MobileNetV2:
    """Batch norms that scale each channel in a way of its own, and shifts that are not zero."""
    torch.manual_seed(0)
    model = MobileNetV2(num_classes=3, width_mult=0.1, output_stride=32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
                module.running_var.uniform_(0.1, 3.0)
        model.classifier[1].bias.normal_()
    return model.eval()


MODEL = trained_like_model()
STATISTICS = model_statistics(MODEL, 32)
LAYERS = STATISTICS.layers
DEPTHWISE = [layer.name for layer in LAYERS if layer.shape[1:] == (1, 3, 3)]


def scan_of(layers, levels, loss) -> list[Measurement]:
    """Rows of a scan; `loss` is a function of the layer's name and the fraction kept."""
    return [Measurement(layer.name, level, 1, 2, loss(layer.name, level)) for layer, level in
            product(layers, levels)]  # fmt: skip


CURVES = loss_curves(
    MODEL, LAYERS, scan_of(LAYERS, (0.0, 0.2, 0.6), lambda name, level: 1 + len(name) * (1 - level) ** 3)
)


def budget_of(target: float, limits: dict[str, Limits]) -> int:
    return weight_budget(target, STATISTICS, limits)


def plain(name: str, shape: tuple[int, ...], nonzeros: int | None = None) -> LayerStatistics:
    total = math.prod(shape)
    return LayerStatistics(name, shape, total, total if nonzeros is None else nonzeros, 0)


def free(layers) -> dict[str, Limits]:
    return {layer.name: Limits(0, layer.nonzeros) for layer in layers}


@settings(max_examples=30, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    target=st.floats(0.12, 1.0),
    spare=st.sets(st.sampled_from(["stem", "classifier", "features.3.conv.2"])),
    least=st.floats(0, 0.1),
    per_channel=st.integers(0, 2),
)
def test_the_budget_is_met_to_the_weight_within_the_limits(method, target, spare, least, per_channel):
    limits = layer_limits(
        LAYERS,
        spare=spare,
        keep_at_least=[("depthwise", least)],
        keep_per_channel=per_channel,
    )
    try:
        budget = budget_of(target, limits)
    except UserError:
        # One of the smallest targets, with most of the limits.
        assert target < 0.5
        return
    kept = allocate(method, MODEL, LAYERS, limits, budget, CURVES)
    assert list(kept) == [layer.name for layer in LAYERS]
    assert sum(kept.values()) == budget
    assert all(limits[name].least <= count <= limits[name].most for name, count in kept.items())
    unprunable = STATISTICS.parameters - sum(layer.parameters for layer in LAYERS)
    assert abs((unprunable + budget) / STATISTICS.parameters - target) <= 0.5 / STATISTICS.parameters + 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_pruning_by_the_written_fractions_gives_the_density(method):
    model = trained_like_model()
    with torch.no_grad():
        # As a model that was pruned before: what is zero cannot be kept once more.
        model.features[18][0].weight.flatten()[::2] = 0
        model.features[4].conv[1][1].bias.zero_()
    statistics = model_statistics(model, 32)
    limits = layer_limits(statistics.layers, keep_at_least=[("features.18.0", 0.9)])
    assert limits["features.18.0"] == Limits(*[statistics.layers[-2].parameters // 2] * 2)
    budget = weight_budget(0.7, statistics, limits)
    kept = allocate(method, model, statistics.layers, limits, budget, CURVES)
    ratios = {
        layer.name: shortest_keep_ratio(kept[layer.name], layer.parameters) for layer in statistics.layers
    }
    FineGrainedPruner(model, ratios).apply()
    after = model_statistics(model, 32)
    assert {layer.name: layer.nonzeros for layer in after.layers} == kept
    assert after.nonzeros == round(0.7 * after.parameters)


@given(st.integers(1, 10**7), st.data())
def test_the_shortest_fraction_keeps_exactly_the_count(total, data):
    kept = data.draw(st.integers(0, total))
    ratio = shortest_keep_ratio(kept, total)
    assert 0 <= ratio <= 1
    assert kept_count(total, ratio) == kept
    assert len(repr(ratio)) <= len(repr(kept / total))
    assert float(repr(ratio)) == ratio


def test_the_shortest_fraction_is_short():
    assert [shortest_keep_ratio(*pair) for pair in ((0, 9), (9, 9), (1, 9), (1, 2), (111_001, 409_600))] == [
        0.0,
        1.0,
        0.1,
        0.5,
        0.270999,
    ]


def test_uniform_keeps_one_fraction():
    kept = allocate("uniform", MODEL, LAYERS, free(LAYERS), 40_000)
    total = sum(layer.parameters for layer in LAYERS)
    for layer in LAYERS:
        assert abs(kept[layer.name] - layer.parameters * 40_000 / total) < 1


def test_what_limits_take_is_made_up_by_the_others_in_proportion():
    limits = {"a": Limits(0, 10), "b": Limits(50, 100), "c": Limits(0, 100), "d": Limits(0, 200)}
    shares = {"a": 100, "b": 100, "c": 100, "d": 200}
    # a takes 10 and b has 50 beyond their shares, 30 are left for c and d.
    assert fill(shares, limits, 90) == {"a": 10, "b": 50, "c": 10, "d": 20}
    assert fill(shares, limits, 91) == {"a": 10, "b": 50, "c": 10, "d": 21}
    assert fill(shares, limits, 50) == {"a": 0, "b": 50, "c": 0, "d": 0}
    assert fill(shares, limits, 410) == {"a": 10, "b": 100, "c": 100, "d": 200}


def erk_by_the_loop_of_the_paper(layers, density: float) -> dict[str, float]:
    """As google-research/rigl computes it: layers denser than 1 are made whole one round at a time."""
    whole: set[str] = set()
    while True:
        zeros = density * sum(layer.parameters for layer in layers)
        zeros -= sum(layer.parameters for layer in layers if layer.name in whole)
        raw = {layer.name: sum(layer.shape) / layer.parameters for layer in layers}
        epsilon = zeros / sum(raw[name.name] * name.parameters for name in layers if name.name not in whole)
        largest = max(raw[layer.name] for layer in layers if layer.name not in whole)
        if largest * epsilon <= 1:
            return {name: 1.0 if name in whole else epsilon * value for name, value in raw.items()}
        whole |= {layer.name for layer in layers if raw[layer.name] == largest}


def test_erk_by_hand():
    layers = [plain("conv", (16, 8, 3, 3)), plain("depthwise", (8, 1, 3, 3)), plain("linear", (10, 16))]
    # Sums of dimensions 30, 15 and 26; 142 = 71 * 2 weights: 60, 30 and 52.
    assert allocate("erk", MODEL, layers, free(layers), 142) == {"conv": 60, "depthwise": 30, "linear": 52}
    # 355 = 71 * 5 would be 150, 75 and 130; depthwise has 72, so 283 go as 30 to 26: 151.6 and 131.4.
    assert allocate("erk", MODEL, layers, free(layers), 355) == {"conv": 152, "depthwise": 72, "linear": 131}


@pytest.mark.parametrize("density", [0.05, 0.271, 0.6, 0.95])
def test_erk_ends_as_the_loop_of_the_paper(density):
    total = sum(layer.parameters for layer in LAYERS)
    budget = round(density * total)
    kept = allocate("erk", MODEL, LAYERS, free(LAYERS), budget)
    expected = erk_by_the_loop_of_the_paper(LAYERS, budget / total)
    assert any(value == 1 for value in expected.values()) == (density > 0.05)
    for layer in LAYERS:
        assert abs(kept[layer.name] - expected[layer.name] * layer.parameters) < 1


@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0, -3.0, 1e-20]), min_size=1, max_size=12))
def test_lamp_scores_by_their_definition(values):
    weight = torch.tensor(values)
    squares = [value**2 for value in weight.double().tolist()]
    # A weight is before another one in falling order if it is larger, or as large and first.
    expected = [
        square / sum(other for j, other in enumerate(squares) if (other, -j) >= (square, -i)) if square else 0
        for i, square in enumerate(squares)
    ]
    np.testing.assert_allclose(lamp_scores(weight).numpy(), expected, rtol=1e-12)


def test_lamp_keeps_the_largest_scores_of_all_layers():
    budget = 20_000
    kept = allocate("lamp", MODEL, LAYERS, free(LAYERS), budget)
    scores = {
        name: lamp_scores(layer.weight.detach().flatten()) for name, layer in prunable_layers(MODEL).items()
    }
    threshold = torch.cat(list(scores.values())).sort(descending=True).values[budget - 1]
    assert kept == {name: int((score >= threshold).sum()) for name, score in scores.items()}
    # The largest weight of a layer scores 1, so that LAMP never empties a layer.
    assert min(kept.values()) > 0
    # In a layer, the largest scores are those of the weights that pruning keeps.
    weight = MODEL.features[5].conv[2].weight.detach()
    order = lamp_scores(weight.flatten()).argsort(descending=True)[:50]
    mask = magnitude_mask(weight, shortest_keep_ratio(50, weight.numel()))
    assert sorted(order.tolist()) == mask.flatten().nonzero().flatten().tolist()


def test_lamp_does_not_depend_on_the_scale_of_a_layer():
    scaled = trained_like_model()
    with torch.no_grad():
        scaled.features[7].conv[2].weight.mul_(1000)
    one, other = (allocate("lamp", model, LAYERS, free(LAYERS), 20_000) for model in (scaled, MODEL))
    assert one == other


def test_global_magnitude_is_one_threshold_for_the_folded_weights():
    budget = 30_000
    kept = allocate("global", MODEL, LAYERS, free(LAYERS), budget)
    folded = {}
    for name, layer in prunable_layers(MODEL).items():
        weight = layer.weight.detach()
        if name != "classifier.1":
            *parent, last = name.split(".")
            norm = MODEL.get_submodule(".".join([*parent, str(int(last) + 1)]))
            scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            weight = weight * scale[:, None, None, None]
        folded[name] = weight.abs()
    threshold = (
        torch.cat([weight.flatten() for weight in folded.values()]).sort(descending=True).values[budget]
    )
    for name, weight in folded.items():
        assert abs(int((weight > threshold * 1.00001).sum()) - kept[name]) <= 1
    # A convolution and its batch norm's variance scaled alike compute the same and keep the same.
    scaled = trained_like_model()
    with torch.no_grad():
        scaled.features[7].conv[2].weight.mul_(1024)
        norm = scaled.features[7].conv[3]
        norm.running_var.copy_((norm.running_var + norm.eps) * 1024**2 - norm.eps)
    rescaled = allocate("global", scaled, LAYERS, free(LAYERS), budget)
    assert sum(abs(rescaled[name] - kept[name]) for name in kept) <= 2


def test_a_dead_channel_has_no_large_folded_weights():
    model = trained_like_model()
    with torch.no_grad():
        model.features[9].conv[0][1].running_var[0] = 1e-12
    assert not folded_weights(model)["features.9.conv.0.0"][0].any()


@given(st.data())
def test_keep_largest_as_a_plain_loop_does_it(data):
    values = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=6)
    scores = {name: torch.tensor(data.draw(values)) for name in "abc"}
    limits = {}
    for name, score in scores.items():
        least = data.draw(st.integers(0, len(score)))
        limits[name] = Limits(least, data.draw(st.integers(least, len(score))))
    lowest, highest = (sum(getattr(l, end) for l in limits.values()) for end in ("least", "most"))  # noqa: E741
    budget = data.draw(st.integers(lowest, highest))
    expected = {name: limit.least for name, limit in limits.items()}
    while sum(expected.values()) < budget:
        falling = {name: sorted(score.tolist(), reverse=True) for name, score in scores.items()}
        open_layers = [name for name in limits if expected[name] < limits[name].most]
        expected[max(open_layers, key=lambda name: falling[name][expected[name]])] += 1
    assert keep_largest(scores, limits, budget) == expected


def one_layer(values) -> torch.nn.Module:
    """A model with one layer, `0`, of these weights."""
    model = torch.nn.Sequential(torch.nn.Linear(len(values), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([values]))
    return model


def test_a_curve_rises_with_the_squares_that_are_pruned():
    # 12 weights of 3, 8 of 2, 4 of 1: with 4 kept, 4 * 1 + 8 * 4 + 8 * 9 = 108 of all squares are gone.
    model = one_layer([3.0] * 12 + [-2.0] * 8 + [1.0] * 4)
    layers = [plain("0", (1, 24))]
    rows = [Measurement("0", kept_count(24, 4 / 24) / 24, 1, 2, 11.8), Measurement("0", 1.0, 1, 2, 1.0)]
    (curve,) = loss_curves(model, layers, rows).values()
    expected = {4: 11.8, 12: 1 + 3.6, 20: 1 + 0.4, 24: 1.0}
    counts, losses = zip(*curve, strict=True)
    assert (counts[0], counts[-1]) == (4, 24)
    for count, loss in expected.items():
        assert np.interp(count, counts, losses) == pytest.approx(loss)


def test_a_curve_never_falls_below_and_is_convex():
    layers, model = [plain("0", (1, 100))], one_layer([1.0] * 100)
    measured = {0.0: 9.0, 0.1: 3.0, 0.2: 5.0, 0.4: 1.5, 0.6: 2.0, 0.8: 0.9}
    rows = [Measurement("0", level, 1, 2, loss) for level, loss in measured.items()]
    # 0.1 and 0.4 are raised to 5.0 and 2.0, and what then lies above the line is left out. 0.9 is all
    # that is known of the loss of the whole model. Of equal weights, the lines are straight.
    expected = [(0, 9.0), (10, 5.0), (40, 2.0), (80, 0.9), (100, 0.9)]
    assert corners(loss_curves(model, layers, rows)["0"]) == expected
    rows.append(Measurement("0", 1.0, 1, 2, 1.0))
    assert corners(loss_curves(model, layers, rows)["0"])[-2:] == [(80, 1.0), (100, 1.0)]
    # Of 30 weights that are left, the sparsities above 0.3 prune none.
    pruned = one_layer([1.0] * 30 + [0.0] * 70)
    curve = loss_curves(pruned, [plain("0", (1, 100), 30)], rows)["0"]
    assert corners(curve) == [(0, 9.0), (10, 5.0), (30, 2.0)]


def corners(curve) -> list[tuple[int, float]]:
    """Where the slope of a curve changes; rounding leaves other points on the lines between."""
    inner = [
        point
        for before, point, after in zip(curve, curve[1:], curve[2:], strict=False)
        if abs(np.interp(point[0], *zip(before, after, strict=True)) - point[1]) > 1e-9
    ]
    return [curve[0], *inner, curve[-1]]


def test_sensitivity_prunes_the_insensitive():
    costs = {"features.2.conv.2": 100.0, "features.18.0": 0.0}
    rows = scan_of(LAYERS, (0.1, 0.4, 0.7), lambda name, level: 1 + costs.get(name, 1.0) * (1 - level) ** 2)
    curves = loss_curves(MODEL, LAYERS, rows)
    limits = layer_limits(LAYERS, curves=curves)
    kept = least_loss(curves, limits, budget_of(0.5, limits))
    sizes = {layer.name: layer.parameters for layer in LAYERS}
    assert kept["features.2.conv.2"] == sizes["features.2.conv.2"]
    assert kept["features.18.0"] == kept_count(sizes["features.18.0"], 0.1)
    with pytest.raises(UserError, match="smallest density possible is 0"):
        budget_of(0.1, limits)


def test_sensitivity_is_the_least_sum_of_all_choices():
    curves = {
        "a": [(0, 9.0), (1, 4.0), (2, 2.0), (3, 1.5), (4, 1.0)],
        "b": [(0, 7.0), (3, 1.0)],
        "c": [(0, 10.0), (2, 3.0), (5, 1.0)],
    }
    limits = {"a": Limits(0, 4), "b": Limits(1, 3), "c": Limits(0, 4)}

    def predicted(kept: dict[str, int]) -> float:
        return sum(np.interp(kept[name], *zip(*curve, strict=True)) for name, curve in curves.items())

    choices = [dict(zip("abc", c, strict=True)) for c in product(range(5), range(1, 4), range(5))]
    for budget in range(1, 12):
        kept = least_loss(curves, limits, budget)
        assert sum(kept.values()) == budget
        assert all(limits[name].least <= count <= limits[name].most for name, count in kept.items())
        best = min(predicted(choice) for choice in choices if sum(choice.values()) == budget)
        assert predicted(kept) == pytest.approx(best)


def test_layers_without_effect_share_what_is_left():
    rows = scan_of(LAYERS, (0.0, 0.5), lambda name, level: 1.0)
    kept = least_loss(loss_curves(MODEL, LAYERS, rows), free(LAYERS), 30_000)
    expected = allocate("uniform", MODEL, LAYERS, free(LAYERS), 30_000)
    assert max(abs(kept[name] - count) for name, count in expected.items()) <= 1


def test_limits_of_groups_and_layers():
    limits = layer_limits(
        LAYERS,
        spare=["stem", "classifier"],
        keep_at_least=[("depthwise", 0.5), (DEPTHWISE[1], 0.7)],
        keep_at_most=[("features.18.0", 0.3), ("features.17.conv.2", 0.0)],
        keep_per_channel=2,
    )
    sizes = {layer.name: layer.parameters for layer in LAYERS}
    for layer in LAYERS:
        total = layer.parameters
        expected = Limits(2 * layer.shape[0], total)
        if layer.name in DEPTHWISE:
            share = 0.7 if layer.name == DEPTHWISE[1] else 0.5
            expected = Limits(max(kept_count(total, share), 2 * layer.shape[0]), total)
        if layer.name in ("features.0.0", "classifier.1"):
            expected = Limits(total, total)
        if layer.name == "features.18.0":
            expected = Limits(2 * layer.shape[0], kept_count(total, 0.3))
        if layer.name == "features.17.conv.2":
            # What names a layer comes before the floor of all.
            expected = Limits(0, 0)
        assert limits[layer.name] == expected
    assert len(DEPTHWISE) == 17
    assert sum(limit.least for limit in limits.values()) < sum(sizes.values())


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"spare": ["depthwse"]}, "did you mean depthwise"),
        ({"keep_at_least": [("features.18", 0.5)]}, r"did you mean features\.18\.0"),
        ({"keep_at_most": [("features.99.0", 0.5)]}, "no layer 'features.99.0'"),
        ({"spare": ["stem"], "keep_at_most": [("stem", 0.5)]}, "features.0.0 must keep at most"),
        (
            {"keep_at_least": [("features.18.0", 0.6)], "keep_at_most": [("features.18.0", 0.5)]},
            "features.18.0 must keep at most",
        ),
    ],
)
def test_limits_that_make_no_sense(limits, says):
    with pytest.raises(UserError, match=says):
        layer_limits(LAYERS, **limits)


def test_the_ends_of_what_is_possible_are_named_and_work():
    limits = layer_limits(LAYERS, keep_per_channel=1, keep_at_most=[("depthwise", 0.5)])
    for target, end in ((0.0, "least"), (1.0, "most")):
        with pytest.raises(UserError) as error:
            budget_of(target, limits)
        named = float(str(error.value).split("density possible is ")[1].split(":")[0])
        assert budget_of(named, limits) == pytest.approx(
            sum(getattr(limit, end) for limit in limits.values()), abs=1
        )
        beyond = named - 2e-5 if target == 0 else named + 2e-5
        with pytest.raises(UserError):
            budget_of(beyond, limits)
