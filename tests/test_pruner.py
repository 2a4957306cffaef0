from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from models import MobileNetV2
from models.statistics import prunable_layers
from utils.common.errors import UserError
from utils.pruning.pruner import CubicRamp, FineGrainedPruner, kept_count, magnitude_mask
from utils.training.optimization import ExponentialMovingAverage, build_optimizer


def small_model(seed: int = 0) -> MobileNetV2:
    torch.manual_seed(seed)
    return MobileNetV2(num_classes=3, width_mult=0.1, dropout=0.0, output_stride=32)


def mixed_ratios(model: nn.Module) -> dict[str, float]:
    """A ratio of its own for each layer, both ends among them."""
    names = list(prunable_layers(model))
    ratios = {name: 0.1 + 0.8 * i / len(names) for i, name in enumerate(names)}
    return ratios | {names[3]: 0.0, names[4]: 1.0}


def assert_pruned(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Exactly +0.0 where pruned, and not zero where kept."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert weight.isfinite().all(), name
        assert torch.equal(weight != 0, mask), name
        assert not torch.signbit(weight[~mask]).any(), name


def test_masks_are_those_of_l1_unstructured():
    model = small_model()
    ratios = mixed_ratios(model)
    pruner = FineGrainedPruner(model, ratios)
    pruner.apply()
    reference = small_model()
    for name, layer in prunable_layers(reference).items():
        prune.l1_unstructured(layer, "weight", amount=1 - ratios[name])
        assert torch.equal(pruner.masks[name], layer.weight_mask.bool()), name
        assert torch.equal(model.get_submodule(name).weight, layer.weight), name
    assert_pruned(model, pruner.masks)


def test_other_parameters_are_left_alone():
    model, untouched = small_model(), small_model()
    FineGrainedPruner(model, dict.fromkeys(prunable_layers(model), 0.3)).apply()
    weights = {f"{name}.weight" for name in prunable_layers(model)}
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value) == (name not in weights), name


@settings(deadline=None, max_examples=200)
@given(total=st.integers(1, 3000), keep_ratio=st.floats(0, 1), levels=st.integers(1, 50))
def test_exactly_the_asked_number_is_kept(total, keep_ratio, levels):
    """With ties as well: weights on few levels, zeros and negative zeros among them."""
    generator = torch.Generator().manual_seed(total)
    weight = torch.randint(-levels, levels + 1, (total,), generator=generator).float() * -0.25
    mask = magnitude_mask(weight, keep_ratio)
    assert mask.sum() == kept_count(total, keep_ratio) == total - round((1 - keep_ratio) * total)
    kept, gone = weight[mask].abs(), weight[~mask].abs()
    if len(kept) and len(gone):
        assert kept.min() >= gone.max()
        tied = torch.nonzero(weight.abs() == kept.min()).flatten()
        assert mask[tied].tolist() == sorted(mask[tied].tolist(), reverse=True)


@settings(deadline=None)
@given(total=st.integers(1, 10_000_000), data=st.data())
def test_every_count_can_be_asked_for(total, data):
    """A budget in weights survives being written as a fraction."""
    kept = data.draw(st.integers(0, total))
    assert kept_count(total, float(repr(kept / total))) == kept


def test_ties_do_not_depend_on_the_memory_format():
    weight = torch.ones(8, 4, 3, 3)
    mask = magnitude_mask(weight, 0.5)
    assert mask.flatten().tolist() == [True] * 144 + [False] * 144
    assert torch.equal(magnitude_mask(weight.to(memory_format=torch.channels_last), 0.5), mask)


def test_nan_is_refused_and_names_the_layer():
    model = small_model()
    model.features[2].conv[0][0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"features\.2\.conv\.0\.0 .*NaN"):
        FineGrainedPruner(model, dict.fromkeys(prunable_layers(model), 0.5))


def test_negative_zero_and_nan_in_pruned_places_become_zero():
    layer = nn.Sequential(nn.Linear(4, 1))
    layer[0].weight.data = torch.tensor([[4.0, -3.0, -0.5, 0.1]])
    pruner = FineGrainedPruner(layer, {"0": 0.5})
    layer[0].weight.data = torch.tensor([[4.0, -3.0, float("nan"), -0.0]])
    pruner.apply()
    assert layer[0].weight.tolist() == [[4.0, -3.0, 0.0, 0.0]]
    assert not torch.signbit(layer[0].weight[0, 2:]).any()


@pytest.mark.parametrize(
    ("ratios", "error"), [({"nowhere": 0.5}, KeyError), ({"0": 1.5}, ValueError), ({"0": -0.1}, ValueError)]
)
def test_ratios_that_make_no_sense(ratios, error):
    with pytest.raises(error):
        FineGrainedPruner(nn.Sequential(nn.Linear(2, 2)), ratios)


def train(model, pruner, optimizer_name, steps, averages=()):
    optimizer = build_optimizer(model, optimizer_name, lr=0.01, weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        for average in averages:
            average.update_parameters(model)
            pruner.apply(average.module)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam", "adamw"])
def test_zeros_stay_through_50_steps(optimizer_name):
    """From a dense start of the average, so that its own past would show in pruned places."""
    model = small_model()
    average = ExponentialMovingAverage(model, 0.99)
    average.update_parameters(model)
    pruner = FineGrainedPruner(model, mixed_ratios(model))
    pruner.apply()
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    before = model.features[1].conv[1].weight.clone()
    train(model, pruner, optimizer_name, 50, [average])
    assert_pruned(model, masks)
    assert_pruned(average.module, masks)
    # The others were free to move.
    assert (model.features[1].conv[1].weight != before).float().mean() > 0.1
    assert not torch.equal(model.features[1].conv[1].weight, average.module.features[1].conv[1].weight)


def test_from_zeros_keeps_what_is_pruned():
    model = small_model()
    ratios = mixed_ratios(model)
    first = FineGrainedPruner(model, ratios)
    first.apply()
    again = FineGrainedPruner.from_zeros(model)
    for name, mask in first.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert kept_count(mask.numel(), again.keep_ratios[name]) == mask.sum()
    train(model, again, "sgd", 3)
    assert_pruned(model, first.masks)


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_the_ramp_is_the_cubic_of_the_paper(initial):
    ramp = CubicRamp(steps=100, every=10)
    target = 0.2
    for step in range(101):
        final_sparsity, initial_sparsity = 1 - target, 1 - initial
        sparsity = final_sparsity + (initial_sparsity - final_sparsity) * (1 - step / 100) ** 3
        assert ramp.keep_ratio(target, step, initial) == pytest.approx(1 - sparsity, abs=1e-12)
    assert ramp.keep_ratio(target, 100) == ramp.keep_ratio(target, 10_000) == target
    assert [step for step in range(1, 120) if CubicRamp(25, 10).is_due(step)] == [10, 20, 25]


@settings(deadline=None)
@given(target=st.floats(0, 1), steps=st.integers(1, 300))
def test_the_ramp_never_turns_back(target, steps):
    ramp = CubicRamp(steps, 1)
    counts = [kept_count(1001, ramp.keep_ratio(target, step)) for step in range(steps + 1)]
    assert counts[0] == 1001
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == kept_count(1001, target)


def test_gradual_pruning_shrinks_to_the_target_and_revives_nothing():
    model = small_model()
    ratios = mixed_ratios(model)
    pruner = FineGrainedPruner(model, ratios, CubicRamp(steps=25, every=10))
    totals = {name: mask.numel() for name, mask in pruner.masks.items()}
    assert pruner.kept() == totals
    seen = [dict(pruner.masks)]
    for _ in range(30):
        train(model, pruner, "adam", 1)
        assert_pruned(model, pruner.masks)
        seen.append(dict(pruner.masks))
    name = "features.3.conv.0.0"
    density = [int(masks[name].sum()) / totals[name] for masks in seen]
    changes = [i for i, (before, after) in enumerate(pairwise(density), 1) if before != after]
    assert changes == [10, 20, 25]
    for before, after in pairwise(seen):
        assert all((before[name] | ~after[name]).all() for name in totals)
    assert pruner.kept() == {name: kept_count(totals[name], ratio) for name, ratio in ratios.items()}


def test_a_pruned_model_is_pruned_further_from_where_it_is():
    model = small_model()
    names = list(prunable_layers(model))
    FineGrainedPruner(model, dict.fromkeys(names, 0.4)).apply()
    zeros = {name: layer.weight == 0 for name, layer in prunable_layers(model).items()}
    ratios = dict.fromkeys(names, 0.2) | {names[3]: 0.7}
    pruner = FineGrainedPruner(model, ratios, CubicRamp(steps=6, every=2))
    for name in names[:3]:
        assert torch.equal(pruner.masks[name], ~zeros[name])
    # One that is to keep more than it has gets more at once.
    assert pruner.kept()[names[3]] == kept_count(zeros[names[3]].numel(), 0.7)
    for _ in range(6):
        train(model, pruner, "adam", 1)
        assert not any(model.get_submodule(name).weight[zeros[name]].any() for name in names[:3])
    assert pruner.kept() == {name: kept_count(zeros[name].numel(), ratio) for name, ratio in ratios.items()}


def test_a_pruned_weight_goes_before_a_kept_one_that_is_zero():
    layer = nn.Sequential(nn.Linear(4, 1))
    layer[0].weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruner = FineGrainedPruner(layer, {"0": 0.5}, CubicRamp(steps=4, every=1))
    pruner.step()  # 1 - (1 - 3/4 cubed) / 2 = 0.71 are kept: 3 of 4
    assert pruner.masks["0"].tolist() == [[False, True, True, True]]
    layer[0].weight.data = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    for _ in range(3):
        pruner.step()
    assert pruner.masks["0"].tolist() == [[False, True, True, False]]


def test_state_goes_on_where_it_stopped():
    def pruned(steps_before_stop: int) -> MobileNetV2:
        model = small_model()
        ratios = mixed_ratios(model)
        pruner = FineGrainedPruner(model, ratios, CubicRamp(steps=12, every=3))
        optimizer = build_optimizer(model, "adam", lr=1e-3, weight_decay=0.05)
        generator = torch.Generator().manual_seed(1)
        model.train()
        for step in range(16):
            if step == steps_before_stop:
                state, weights = pruner.state_dict(), model.state_dict()
                momentum = optimizer.state_dict()
                model = small_model(seed=5)
                model.load_state_dict(weights)
                pruner = FineGrainedPruner(model, ratios, CubicRamp(steps=12, every=3))
                pruner.load_state_dict(state)
                optimizer = build_optimizer(model, "adam", lr=1e-3, weight_decay=0.05)
                optimizer.load_state_dict(momentum)
                model.train()
            images = torch.randn(4, 3, 32, 32, generator=generator)
            labels = torch.randint(3, (4,), generator=generator)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        return model

    whole, stopped = pruned(-1), pruned(7)
    assert whole.features[0][0].weight.isfinite().all()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, stopped.state_dict()[name]), name


def test_state_of_other_targets_or_another_model_is_refused():
    model = small_model()
    names = list(prunable_layers(model))
    pruner = FineGrainedPruner(model, {names[0]: 0.5})
    with pytest.raises(UserError, match="--sparsity_dict"):
        pruner.load_state_dict(FineGrainedPruner(model, {names[0]: 0.4}).state_dict())
    wider = FineGrainedPruner(MobileNetV2(num_classes=3, width_mult=0.5), {names[0]: 0.5})
    with pytest.raises(ValueError, match="another model"):
        pruner.load_state_dict(wider.state_dict())
