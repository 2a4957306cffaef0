import pytest
import torch
from torch import nn

from models import MobileNetV2
from utils.training.muon import orthogonalize
from utils.training.optimization import build_optimizer, build_scheduler

LR, MUON_LR, WEIGHT_DECAY = 0.2, 0.05, 5e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_an_orthogonalized_matrix_keeps_its_directions_and_has_singular_values_of_about_one(
    shape, dtype, tolerance
):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, dtype)
    assert result.dtype == matrix.dtype
    in_its_directions = u.T @ result @ v.T
    diagonal = in_its_directions.diagonal()
    assert (in_its_directions - diagonal.diag()).abs().max() < tolerance
    well_conditioned = diagonal[values > 0.05 * values.max()]
    assert 0.6 < well_conditioned.min() <= well_conditioned.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_zeros_or_of_low_rank_stays_finite(dtype):
    assert not orthogonalize(torch.zeros(8, 4), dtype).any()
    low_rank = torch.outer(torch.ones(8), torch.ones(30))
    assert torch.linalg.matrix_norm(orthogonalize(low_rank, dtype), 2) < 1.3


def test_bfloat16_orthogonalizes_a_gradient_of_fast_falling_singular_values_as_float32_does():
    u, _, v = torch.linalg.svd(torch.randn(96, 160, generator=torch.Generator().manual_seed(0)), False)
    matrix = u * torch.arange(1, 97) ** -1.0 @ v
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix, torch.bfloat16)
    assert torch.linalg.matrix_norm(rounded, 2) < 1.3
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.995


def test_muon_steps_pointwise_convolutions_by_orthogonal_updates_and_the_rest_as_sgd():
    torch.manual_seed(0)
    model = MobileNetV2(width_mult=0.25)
    twin = MobileNetV2(width_mult=0.25)
    twin.load_state_dict(model.state_dict())
    muon = build_optimizer(model, "muon", LR, WEIGHT_DECAY, MUON_LR)
    sgd = build_optimizer(twin, "sgd", LR, WEIGHT_DECAY, MUON_LR)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for optimizer, net in ((muon, model), (sgd, twin)):
        for name, parameter in net.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
    theirs = dict(twin.named_parameters())
    pointwise = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and parameter.shape[2:] == (1, 1):
            pointwise += 1
            decayed = before[name] * (1 - LR * WEIGHT_DECAY)
            update = (decayed - parameter.detach()).flatten(1) / MUON_LR
            rows, columns = update.shape
            expected = orthogonalize(gradients[name].flatten(1)) * max(1, rows / columns) ** 0.5
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(parameter, theirs[name])
    assert pointwise == 34


def test_muon_takes_a_3x3_convolution_as_a_matrix_but_not_a_stem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last)
    before = [layer.weight.detach().clone() for layer in model]
    gradients = [torch.randn_like(weight) for weight in before]
    for layer, gradient in zip(model, gradients, strict=True):
        layer.weight.grad = gradient.clone()
    build_optimizer(model, "muon", LR, WEIGHT_DECAY, MUON_LR).step()
    stem, inner = (
        weight * (1 - LR * WEIGHT_DECAY) - layer.weight.detach()
        for weight, layer in zip(before, model, strict=True)
    )
    torch.testing.assert_close(stem, 1.9 * LR * gradients[0], rtol=1e-3, atol=1e-3)
    expected = orthogonalize(gradients[1].flatten(1)).view_as(inner)
    torch.testing.assert_close(inner / MUON_LR, expected, rtol=1e-3, atol=1e-3)


def test_muon_goes_on_from_its_state_as_if_it_had_not_stopped():
    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(8, 2))
        return model, build_optimizer(model, "muon", LR, WEIGHT_DECAY, MUON_LR)

    def step(model, optimizer, seed):
        x = torch.randn(4, 6, 1, 1, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    whole, optimizer = model_and_optimizer()
    for seed in range(4):
        step(whole, optimizer, seed)
    first, optimizer = model_and_optimizer()
    for seed in range(2):
        step(first, optimizer, seed)
    second, resumed = model_and_optimizer()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(2, 4):
        step(second, resumed, seed)
    assert torch.equal(whole[0].weight, second[0].weight)


def test_one_cycle_scales_every_group_from_its_own_highest_rate():
    optimizer = build_optimizer(MobileNetV2(width_mult=0.25), "muon", LR, WEIGHT_DECAY, MUON_LR)
    scheduler = build_scheduler(optimizer, "one_cycle", 10)
    highest = [0.0] * 3
    for _ in range(10):
        highest = [max(h, group["lr"]) for h, group in zip(highest, optimizer.param_groups, strict=True)]
        optimizer.step()
        scheduler.step()
    assert highest == pytest.approx([0.05, 0.2, 0.2], rel=0.05)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[1]["lr"] / 4)
