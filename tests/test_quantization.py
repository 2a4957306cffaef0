import copy
import math
from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import FakeQuantize

from models import MobileNetV2Quantization
from models.folding import INPUT, fold_batch_norms
from models.statistics import prunable_layers
from utils.common.errors import UserError
from utils.data.datasets import load_data
from utils.data.loader import Loader, normalize
from utils.evaluation import evaluate
from utils.open_weights import open_weights
from utils.pruning.pruner import FineGrainedPruner
from utils.quantization.bias_correction import correct_biases
from utils.quantization.eager import (
    WEIGHT_BITS,
    ActivationObserver,
    WeightObserver,
    calibrate,
    calibrate_qat,
    convert_qat,
    freeze_batch_norms,
    freeze_ranges,
    from_module,
    layer_bits,
    post_training_quantize,
    prepare_qat,
    to_module,
    use_engine,
)
from utils.quantization.int8_model import BIAS_UNITS_PER_STEP, Int8Model, bias_units
from utils.quantization.observers import LARGEST_PAIR, largest_pair, scale_from_index, scale_index

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]
ENGINE = "fbgemm" if "fbgemm" in ENGINES else "qnnpack"


@pytest.fixture(autouse=True)
def engine():
    use_engine(ENGINE)


@pytest.fixture(scope="module")
def weights(tiny_qmodel):
    return open_weights(tiny_qmodel, "qmodel")


@pytest.fixture(scope="module")
def data(tiny_folder):
    return load_data(Namespace(dataset="folder", data_dir=tiny_folder, image_size=None, val_size=None))


@pytest.fixture(scope="module")
def batches(weights, data):
    """For calibration and for a few steps of training."""
    return Loader(data.train, weights.normalization, 27, shuffle=True)


@pytest.fixture(scope="module")
def test_images(weights, data):
    return normalize(data.test.images, weights.normalization)


@pytest.fixture(scope="module")
def calibrated(weights, batches):
    use_engine(ENGINE)
    return calibrate(weights.model, batches)


@pytest.fixture(scope="module")
def reference(weights):
    return fold_batch_norms(weights.model)


@torch.no_grad()
def logits_of(model, images):
    return (to_module(model) if isinstance(model, Int8Model) else model)(images)


def int8_parameters(model: Int8Model) -> dict[str, torch.Tensor]:
    weights = {f"{name}.weight": weight for name, weight in model.weights.items()}
    return weights | {f"{name}.bias": bias for name, bias in model.biases.items()}


def signal_to_noise_db(expected, found) -> float:
    return (10 * torch.log10(expected.square().mean() / (found - expected).square().mean())).item()


def pruned(model: MobileNetV2Quantization, keep_ratio: float) -> MobileNetV2Quantization:
    model = copy.deepcopy(model)
    FineGrainedPruner(model, dict.fromkeys(prunable_layers(model), keep_ratio)).apply()
    return model


def zeros_of(model) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": layer.weight == 0 for name, layer in prunable_layers(model).items()}


def few_steps(model, batches, optimizer, after_step=()) -> None:
    model.train()
    for images, labels in batches:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for hook in after_step:
            hook()


# Engines


def test_an_unknown_engine_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=f"engine 'tpu' is not supported here: use one of .*{ENGINE}"):
        use_engine("tpu")
    assert torch.backends.quantized.engine == ENGINE


@pytest.mark.parametrize("name", ENGINES)
def test_a_supported_engine_becomes_the_current_one(name):
    use_engine(name)
    assert torch.backends.quantized.engine == name


# Weights


def test_the_largest_pair_is_of_neighbours_of_one_sign():
    filters = torch.tensor([[1.0, 2.0, -4.0, 3.0], [5.0, -6.0, -1.0, -2.0], [-1.0, -2.0, -3.0, -4.0]])
    assert largest_pair(filters).tolist() == [3 + 1.0, 6.0, 7.0]


def test_neighbours_are_counted_with_the_input_channel_fastest():
    weight = torch.zeros(1, 2, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    weight[0, :, 0, 1] = torch.tensor([5.0, -1.0])
    assert largest_pair(weight).tolist() == [7.0]


def test_an_odd_filter_has_a_last_weight_without_neighbour():
    assert largest_pair(torch.tensor([[1.0, 1.0, 9.0]])).tolist() == [9.0]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(16, 1, 3, 3), (8, 3, 3, 3), (24, 40, 1, 1), (10, 33), (5, 1, 1, 1)])
def test_no_two_neighbours_can_overflow_16_bits(shape, per_channel):
    generator = torch.Generator().manual_seed(0)
    smallest_largest = 128
    for _ in range(20):
        weight = torch.randn(shape, generator=generator).sign() * (
            0.1 + torch.rand(shape, generator=generator) ** 3
        )
        observer = WeightObserver(per_channel)
        observer(weight)
        scale, zero_point = observer.calculate_qparams()
        assert not zero_point.any()
        assert len(scale) == (shape[0] if per_channel else 1)
        codes = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round()
        assert codes.abs().max() <= 127
        sums = largest_pair(codes)
        assert sums.max() <= LARGEST_PAIR
        smallest_largest = min(smallest_largest, (sums if per_channel else sums.max()).min().item())
    # The range is used up, but for the eighth of an octave by which a scale may be larger.
    assert smallest_largest >= 126 / 2 ** (1 / 8)
    assert 255 * LARGEST_PAIR < 2**15


@st.composite
def weights_of_any_kind(draw) -> torch.Tensor:
    """Even or with outliers, dense or pruned, small or large, with dead filters."""
    shape = draw(st.sampled_from([(4, 1, 3, 3), (6, 3, 3, 3), (5, 40, 1, 1), (3, 33), (2, 1, 1, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(shape, generator=generator) ** draw(st.sampled_from((1, 3, 7)))
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    kept[draw(st.integers(0, shape[0] - 1))] = draw(st.booleans())
    return values * kept * 10.0 ** draw(st.integers(-4, 2))


@given(weights_of_any_kind(), st.sampled_from(WEIGHT_BITS), st.booleans())
@settings(max_examples=300, deadline=None)
def test_codes_of_all_bits_keep_their_range_and_the_rule_of_pairs(weight, bits, per_channel):
    quantizer = FakeQuantize(WeightObserver, per_channel=per_channel, bits=bits)
    rounded, scale = quantizer(weight), quantizer.scale.view(-1, *[1] * (weight.dim() - 1))
    codes = rounded / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    codes = codes.round()
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert largest_pair(codes).max() <= LARGEST_PAIR
    assert not codes[weight == 0].any()
    assert not quantizer.zero_point.any()
    assert len(quantizer.scale) == (len(weight) if per_channel else 1)
    assert torch.equal(scale_from_index(scale_index(quantizer.scale)), quantizer.scale)
    # A weight is off by half a scale, or large and clipped by a twelfth.
    error = (rounded - weight).abs()
    largest = weight.abs().flatten(1).amax(1)
    largest = (largest if per_channel else largest.max()).view(-1, *[1] * (weight.dim() - 1))
    assert (error <= 0.5001 * scale + (0.09 * largest if bits < 8 else 0)).all()


@given(st.floats(2**-20, 2**10, width=32))
@settings(max_examples=300, deadline=None)
def test_a_scale_is_the_next_of_eight_an_octave(value):
    scale = scale_from_index(scale_index(torch.tensor([value])))
    assert scale.dtype == torch.float32
    assert value * (1 - 1e-6) <= scale.item() <= value * 2 ** (1 / 8) * (1 + 1e-6)
    assert scale.item() == pytest.approx(
        2.0 ** (round(8 * math.log2(scale.item()) - 0.5) / 8 + 1 / 16), rel=1e-6
    )


def test_a_scale_that_is_possible_stays():
    codes = torch.arange(0, 256, dtype=torch.int)
    assert torch.equal(scale_index(scale_from_index(codes)), codes)
    assert scale_from_index(codes)[::8].tolist() == pytest.approx(
        [2.0**k * 2 ** (1 / 16) for k in range(-20, 12)], rel=1e-6
    )


def test_the_largest_weight_of_few_bits_is_clipped_if_that_costs_less():
    """Weights are 15.2 and 15.45 steps of the smaller scale, 13.9 and 14.2 of the larger one."""
    whole = torch.arange(-15.0, 16.0)
    one, all_of_them = torch.cat([whole, torch.tensor([15.2])]), torch.full_like(whole, 15.45)
    for weight, expected in ((one, 160), (all_of_them, 161)):
        observer = WeightObserver(per_channel=True, bits=5)
        observer(weight.view(1, -1) * scale_from_index(torch.tensor([160])))
        assert scale_index(observer.calculate_qparams()[0]).tolist() == [expected]


def test_the_first_layer_and_the_depthwise_ones_keep_8_bits(weights):
    layers = {layer: name for name, layer in prunable_layers(weights.model).items()}
    found = {layers[layer]: bits for layer, bits in layer_bits(weights.model, 4).items()}
    assert list(found) == list(layers.values())
    wide = [name for name, bits in found.items() if bits == 8]
    assert wide == ["features.0.0", "features.1.conv.0.0"] + [
        f"features.{block}.conv.1.0" for block in range(2, 18)
    ]
    assert set(found.values()) == {4, 8}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "kernel_size", "groups"),
    [(128, 128, 3, 128), (96, 40, 1, 1), (3, 16, 3, 1)],
    ids=["depthwise", "pointwise", "stem"],
)
def test_kernels_are_exact_on_the_largest_activations(name, in_channels, out_channels, kernel_size, groups):
    use_engine(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(out_channels, in_channels // groups, kernel_size, kernel_size, generator=generator)
    weight[1::2] *= -1
    observer = WeightObserver(per_channel=True)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    packed = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.qint8)
    images = torch.full((1, in_channels, 4, 4), 255.0)
    exact = nn.functional.conv2d(
        images.double(), packed.int_repr().double(), padding=kernel_size // 2, groups=groups
    ) * scale.double().view(1, -1, 1, 1)
    step = exact.abs().max().item() / 120
    layer = torch.ops.quantized.conv2d_prepack(packed, None, [1, 1], [kernel_size // 2] * 2, [1, 1], groups)
    quantized = torch.quantize_per_tensor(images, 1.0, 0, torch.quint8)
    found = torch.ops.quantized.conv2d(quantized, layer, step, 128).int_repr().double() - 128
    assert (found - (exact / step)).abs().max() <= 0.51


# Ranges of activations


def observe(values) -> tuple[float, int]:
    observer = ActivationObserver()
    observer(values)
    scale, zero_point = observer.calculate_qparams()
    return scale.item(), zero_point.item()


def squared_error(values, scale, zero_point) -> float:
    found = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, 255)
    return (found - values).square().sum().item()


def test_even_values_keep_their_range():
    scale, zero_point = observe(torch.linspace(0, 6, 10_001))
    assert (scale, zero_point) == (pytest.approx(6 / 255, rel=1e-3), 0)


def test_few_outliers_are_clipped_since_that_costs_less():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[0] = 40.0
    scale, zero_point = observe(values)
    widest = (40 - values.min().item()) / 255
    assert scale < 0.9 * widest
    widest_zero_point = round(-values.min().item() / widest)
    assert squared_error(values, scale, zero_point) < squared_error(values, widest, widest_zero_point)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 1.0), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0)])
def test_zero_is_among_the_values(low, high):
    scale, zero_point = observe(torch.linspace(low, high, 1000))
    assert scale > 0
    assert 0 <= zero_point <= 255
    if low >= 0:
        assert zero_point == 0


# After training


@pytest.mark.parametrize("name", ENGINES)
def test_int8_answers_as_float_does(weights, calibrated, data, test_images, name):
    """Margins: 3 points of accuracy; logits within a tenth of their size."""
    use_engine(name)
    expected = logits_of(weights.model, test_images)
    float_accuracy_pct = 100 * (expected.argmax(1) == data.test.labels).double().mean().item()
    assert float_accuracy_pct > 90
    for per_channel in (False, True):
        model = post_training_quantize(calibrated, per_channel)
        found = logits_of(model, test_images)
        assert signal_to_noise_db(expected, found) > 15
        batches = Loader(data.test, weights.normalization, batch_size=32)
        accuracy_pct = evaluate(to_module(model), batches).accuracy_pct
        assert abs(accuracy_pct - float_accuracy_pct) <= 3


def test_engines_answer_alike(calibrated, test_images):
    answers = []
    for name in ENGINES:
        use_engine(name)
        answers.append(logits_of(post_training_quantize(calibrated, per_channel=True), test_images))
    for other in answers[1:]:
        assert signal_to_noise_db(answers[0], other) > 30


def test_per_channel_is_closer_to_float_than_per_tensor(weights, batches, test_images):
    # Channels of very different sizes are what one scale for all does badly.
    model = copy.deepcopy(weights.model)
    depthwise = model.features[2].conv[1]
    with torch.no_grad():
        depthwise[1].weight[::2] *= 0.02
    expected = logits_of(model, test_images)
    calibrated = calibrate(model, batches)
    per_channel, per_tensor = (
        signal_to_noise_db(expected, logits_of(post_training_quantize(calibrated, kind), test_images))
        for kind in (True, False)
    )
    assert per_channel > per_tensor


def test_calibration_leaves_the_model_and_its_batch_norms_alone(weights, batches):
    before = {name: value.clone() for name, value in weights.model.state_dict().items()}
    calibrate(weights.model, batches)
    after = weights.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_both_kinds_come_from_one_calibration(calibrated, test_images):
    first = logits_of(post_training_quantize(calibrated, per_channel=True), test_images)
    post_training_quantize(calibrated, per_channel=False)
    again = logits_of(post_training_quantize(calibrated, per_channel=True), test_images)
    assert torch.equal(first, again)


def test_relu6_is_where_the_convolution_saturates(weights, batches):
    model = copy.deepcopy(weights.model)
    with torch.no_grad():
        model.features[0][1].weight.mul_(20)  # far beyond 6
    folded = fold_batch_norms(model)
    int8 = to_module(post_training_quantize(calibrate(model, batches), per_channel=True))
    images, _ = next(iter(batches))
    before_clamp = logits_of(folded.features[0][0], images)
    assert before_clamp.max() > 20
    assert before_clamp.min() < -20
    found = logits_of(int8.features[0], int8.quant(images)).dequantize()
    assert found.min() == 0
    assert 5.9 < found.max() <= 6 + 1e-5
    assert not any(type(m).__name__.endswith("ReLU6") for m in int8.modules())
    # And what lies between is as it was.
    expected = before_clamp.clamp(0, 6)
    assert (found - expected).abs().mean() < 0.05


def test_ranges_of_activations_lie_within_relu6s(calibrated):
    int8 = post_training_quantize(calibrated, per_channel=True)
    activated = [
        name
        for name, s in calibrated.named_modules()
        if isinstance(s, nn.Sequential) and isinstance(s[-1], nn.ReLU6)
    ]
    assert len(activated) == 35
    for name in activated:
        qparams = int8.activations[f"{name}.0"]
        assert qparams.zero_point == 0
        assert 0 < 255 * qparams.scale <= 6 + 1e-5


@pytest.mark.parametrize("per_channel", [True, False])
def test_int8_parameters_are_those_of_the_folded_model(weights, calibrated, per_channel):
    found = int8_parameters(post_training_quantize(calibrated, per_channel))
    expected = dict(fold_batch_norms(weights.model).named_parameters())
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    for name, value in found.items():
        assert value.dtype == (torch.int8 if name.endswith("weight") else torch.float32)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("keep_ratio", [0.27, 0.0])
def test_pruned_weights_are_zero_in_int8(weights, batches, test_images, keep_ratio, per_channel):
    model = pruned(weights.model, keep_ratio)
    int8 = post_training_quantize(calibrate(model, batches), per_channel)
    parameters = int8_parameters(int8)
    for name, zeros in zeros_of(model).items():
        assert not parameters[name][zeros].any(), name
        if per_channel and keep_ratio:
            # Few others are rounded to it.
            assert (parameters[name] != 0).sum() > 0.9 * (~zeros).sum(), name
    found = logits_of(int8, test_images)
    assert found.isfinite().all()
    if not keep_ratio:  # biases alone are left
        expected = logits_of(model, test_images)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_few_bits_use_few_codes_and_keep_zeros(weights, batches, bits, per_channel):
    model = pruned(weights.model, 0.27)
    int8 = post_training_quantize(calibrate(model, batches), per_channel, bits)
    allowed = {
        name: value for value, name in zip(layer_bits(model, bits).values(), zeros_of(model), strict=True)
    }
    parameters = int8_parameters(int8)
    for name, zeros in zeros_of(model).items():
        codes = parameters[name]
        assert codes.abs().max() <= 2 ** (allowed[name] - 1) - 1, name
        assert largest_pair(codes.float()).max() <= LARGEST_PAIR, name
        assert not codes[zeros].any(), name
        if allowed[name] < 8:
            assert codes.abs().max() >= 0.75 * 2 ** (bits - 1), name


def test_fewer_bits_answer_less_exactly(weights, calibrated, test_images):
    expected = logits_of(weights.model, test_images)
    found = [
        signal_to_noise_db(expected, logits_of(post_training_quantize(calibrated, True, bits), test_images))
        for bits in (8, 6, 4)
    ]
    assert found[0] > found[1] > found[2] > 3


@pytest.mark.parametrize("bits", [8, 4])
def test_training_and_calibration_agree_on_codes(weights, batches, bits):
    trained = prepare_qat(weights.model, bits)
    calibrate_qat(trained, batches)
    found = int8_parameters(convert_qat(trained))
    expected = int8_parameters(post_training_quantize(calibrate(weights.model, batches), True, bits))
    for name, codes in expected.items():
        if name.endswith("weight"):
            assert torch.equal(found[name], codes), name


def test_biases_are_rounded_to_a_power_of_two_of_steps():
    """Brought up to at most a quarter of the output's step; those that are larger stay."""
    steps = torch.tensor([1e-9, 1e-4, 0.0025, 0.003, 1.0], dtype=torch.float64)
    units = bias_units(steps, 0.02)
    most = 0.02 / BIAS_UNITS_PER_STEP
    assert ((units[:3] <= most) & (units[:3] > most / 2)).all()
    assert units[3:].tolist() == [0.003, 1.0]
    mantissas, _ = torch.frexp(units / steps)
    assert (mantissas == 0.5).all()


def test_biases_are_whole_accumulator_steps(calibrated):
    int8 = post_training_quantize(calibrated, per_channel=True)
    for layer, source in (("features.0.0", INPUT), ("classifier.1", "features.18.0")):
        input_scale = int8.activations[source].scale
        steps = int8.biases[layer].double() / (int8.scales[layer].double() * input_scale)
        assert steps.abs().max() > 100
        assert (steps - steps.round()).abs().max() < 1e-6 * steps.abs().max()


# While training


def prepared(weights, batches, has_batch_norms=True):
    model = prepare_qat(weights.model, has_batch_norms=has_batch_norms)
    calibrate_qat(model, batches)
    return model


def after_few_steps(model, batches):
    use_engine(ENGINE)
    torch.manual_seed(0)
    few_steps(model, batches, torch.optim.SGD(model.parameters(), lr=1e-3))
    return model


@pytest.fixture(scope="module")
def trained(weights, batches):
    """A model after a few steps with the rounding of int8."""
    return after_few_steps(prepared(weights, batches), batches)


@pytest.fixture(scope="module")
def trained_folded(weights, batches):
    """The same, whose batch norms were folded before."""
    return after_few_steps(prepared(weights, batches, has_batch_norms=False), batches)


@pytest.fixture(params=["trained", "trained_folded"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("has_batch_norms", [True, False])
def test_before_training_the_int8_model_answers_as_float_does(weights, batches, test_images, has_batch_norms):
    expected = logits_of(weights.model, test_images)
    found = logits_of(convert_qat(prepared(weights, batches, has_batch_norms)), test_images)
    assert signal_to_noise_db(expected, found) > 15


def test_folded_before_or_while_converting_is_the_same(weights, batches, test_images):
    with_norms, folded = (convert_qat(prepared(weights, batches, has)) for has in (True, False))
    found = logits_of(folded, test_images)
    assert signal_to_noise_db(logits_of(with_norms, test_images), found) > 25


def test_folded_before_no_batch_norm_is_left(trained, trained_folded):
    assert any("running_mean" in name for name in trained.state_dict())
    assert not any("running_mean" in name for name in trained_folded.state_dict())


def test_training_sees_what_the_int8_model_answers(either, test_images):
    imitation = copy.deepcopy(either).eval()
    freeze_ranges(imitation)
    found = logits_of(convert_qat(either), test_images)
    assert signal_to_noise_db(logits_of(imitation, test_images), found) > 20


def test_converting_leaves_the_model_as_it_was(either):
    before = copy.deepcopy(either.state_dict())
    convert_qat(either)
    assert all(torch.equal(value, before[name]) for name, value in either.state_dict().items())
    assert either.training


@pytest.mark.parametrize("has_batch_norms", [True, False])
def test_a_state_comes_back_into_a_new_model(weights, request, test_images, tmp_path, has_batch_norms):
    trained = request.getfixturevalue("trained" if has_batch_norms else "trained_folded")
    torch.save(trained.state_dict(), tmp_path / "state.pth")
    restored = prepare_qat(weights.model, has_batch_norms=has_batch_norms)
    restored.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    expected = logits_of(convert_qat(trained), test_images)
    assert torch.equal(logits_of(convert_qat(restored), test_images), expected)


def test_gradients_reach_every_parameter(either, batches):
    model = copy.deepcopy(either)
    images, labels = next(iter(batches))
    nn.functional.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    parameters = list(model.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in parameters) > 0.95 * len(parameters)


def ranges_of(model) -> list[torch.Tensor]:
    return [
        m.scale.clone()
        for n, m in model.named_modules()
        if n.endswith("activation_post_process") and hasattr(m, "scale") and "weight_fake_quant" not in n
    ]


def test_frozen_ranges_stay_and_weight_scales_follow(trained, batches):
    model = copy.deepcopy(trained)
    ranges = ranges_of(model)
    assert len(ranges) > 60
    freeze_ranges(model)
    with torch.no_grad():
        model.features[0][0].weight.mul_(2)
        model.features[0][0].bn.running_var.mul_(1.5)
    weight_scale = model.features[0][0].weight_fake_quant.scale.clone()
    few_steps(model, batches, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert all(map(torch.equal, ranges, ranges_of(model)))
    assert not torch.equal(weight_scale, model.features[0][0].weight_fake_quant.scale)


def test_ranges_move_until_they_are_frozen(trained, batches):
    model = copy.deepcopy(trained)
    ranges = ranges_of(model)
    few_steps(model, batches, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert sum(not torch.equal(a, b) for a, b in zip(ranges, ranges_of(model), strict=True)) > 50


def test_frozen_batch_norms_stay_even_in_train_mode(trained, batches):
    model = copy.deepcopy(trained)
    freeze_batch_norms(model)
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    assert len(statistics) == 104
    few_steps(model, batches, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert all(torch.equal(model.get_buffer(name), value) for name, value in statistics.items())


@pytest.mark.parametrize("has_batch_norms", [True, False])
@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-2),
    lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2),
], ids=["sgd", "adamw"])  # fmt: skip
def test_pruned_weights_are_zero_after_training_and_in_int8(weights, batches, optimizer, has_batch_norms):
    float_model = pruned(weights.model, 0.3)
    zeros = zeros_of(float_model)
    model = prepare_qat(float_model, has_batch_norms=has_batch_norms)
    calibrate_qat(model, batches)
    pruner = FineGrainedPruner.from_zeros(model)
    for _ in range(2):
        few_steps(model, batches, optimizer(model.parameters()), [pruner.apply])
    moved = 0
    for name, layer in prunable_layers(model).items():
        assert torch.equal(layer.weight == 0, zeros[f"{name}.weight"]), name
        moved += (layer.weight != prunable_layers(float_model)[name].weight).sum().item()
    assert moved > 1000
    for name, weight in int8_parameters(convert_qat(model)).items():
        if name.endswith("weight"):
            assert not weight[zeros[name]].any(), name


def test_the_prunable_layers_keep_their_names(weights, trained):
    assert list(prunable_layers(trained)) == list(prunable_layers(weights.model))


def test_a_dead_channel_does_not_coarsen_the_others(weights, batches, test_images):
    """Its batch norm divides by next to nothing; one scale a tensor would be made for it alone."""
    model = copy.deepcopy(weights.model)
    norm = model.features[1].conv[0][1]
    with torch.no_grad():
        # The channel's input is dead, and so are its statistics.
        model.features[0][1].weight[3] = 0
        model.features[0][1].bias[3] = -1
        norm.running_mean[3] = 0
        norm.running_var[3] = 1e-14
        norm.weight[3] = 1.4
    assert fold_batch_norms(model).features[1].conv[0][0].weight[3].abs().max() > 10
    expected = logits_of(fold_batch_norms(model), test_images)
    found = logits_of(post_training_quantize(calibrate(model, batches), per_channel=False), test_images)
    assert signal_to_noise_db(expected, found) > 10


def test_tensors_become_modules_and_come_back(calibrated):
    for per_channel in (False, True):
        model = post_training_quantize(calibrated, per_channel)
        again = from_module(to_module(model))
        assert (again.architecture, again.activations) == (model.architecture, model.activations)
        for name, weight in model.weights.items():
            assert torch.equal(again.weights[name], weight)
            assert torch.equal(again.scales[name], model.scales[name])
            assert torch.equal(again.biases[name], model.biases[name])
        assert model.per_channel == per_channel


# Bias correction


@torch.no_grad()
def errors_of(model, reference, images):
    return logits_of(model, images) - reference(images)


@pytest.mark.parametrize("name", ENGINES)
def test_images_never_seen_are_answered_more_as_float_does(test_images, batches, reference, calibrated, name):
    use_engine(name)
    for per_channel in (False, True):
        model = post_training_quantize(calibrated, per_channel, weight_bits=5)
        before = errors_of(model, reference, test_images)
        after = errors_of(correct_biases(model, reference, batches), reference, test_images)
        assert after.square().mean() < 0.8 * before.square().mean()


def test_the_mean_error_of_each_logit_is_gone(batches, reference, calibrated):
    images = torch.cat([images for images, _ in batches])
    model = post_training_quantize(calibrated, per_channel=False, weight_bits=5)
    before = errors_of(model, reference, images).mean(0).abs()
    corrected = correct_biases(model, reference, [(images, None)])
    after = errors_of(corrected, reference, images).mean(0).abs()
    # Half a step is what rounding the logits may leave, and another what rounding the biases may.
    assert after.max() < model.activations["classifier.1"].scale < before.max() / 2


def test_later_batches_count_less(batches, reference, calibrated):
    """So that the biases settle, whichever batch comes last."""
    first, second = [batch for batch, _ in batches][:2]

    def biases_after(*images: torch.Tensor) -> torch.Tensor:
        model = post_training_quantize(calibrated, per_channel=False, weight_bits=5)
        return torch.cat(
            [*correct_biases(model, reference, [(batch, None) for batch in images]).biases.values()]
        )

    early = biases_after(first, second) - biases_after(first)
    late = biases_after(*[first] * 9, second) - biases_after(*[first] * 9)
    assert late.norm() < early.norm() / 2


def test_biases_alone_change_and_stay_whole_steps(batches, reference, calibrated):
    model = post_training_quantize(calibrated, per_channel=True)
    before = int8_parameters(model)
    corrected = correct_biases(model, reference, batches)
    after = int8_parameters(corrected)
    for name, value in before.items():
        assert name.endswith("bias") or torch.equal(value, after[name])
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    again = int8_parameters(corrected.with_rounded_biases())
    assert all(torch.equal(value, after[name]) for name, value in again.items())


def test_nothing_is_left_on_either_model(batches, reference, calibrated):
    state = copy.deepcopy(reference.state_dict())
    model = post_training_quantize(calibrated, per_channel=True)
    correct_biases(model, reference, batches)
    for module in reference.modules():
        assert not module._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in reference.state_dict().items())


def test_channels_that_relu6_always_holds_stay(weights, batches):
    model = copy.deepcopy(weights.model)
    norm = model.features[1].conv[0][1]
    with torch.no_grad():
        norm.bias[0], norm.bias[1] = -100.0, 100.0
    reference = fold_batch_norms(model)
    int8 = post_training_quantize(calibrate(model, batches), per_channel=True)
    name = "features.1.conv.0.0.bias"
    before = int8_parameters(int8)[name]
    after = int8_parameters(correct_biases(int8, reference, batches))[name]
    torch.testing.assert_close(after[:2], before[:2])
