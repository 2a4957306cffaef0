import copy
from argparse import Namespace

import pytest
import torch

from utils.batches import Batches, normalize
from utils.bias_correction import correct_biases
from utils.data import load_data
from utils.quantization import (
    calibrate,
    fold_batch_norms,
    int8_parameters,
    post_training_quantize,
    round_biases,
    use_engine,
)
from utils.weights import load_weights

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]


@pytest.fixture(autouse=True)
def engine():
    use_engine(ENGINES[0])


@pytest.fixture(scope="module")
def weights(tiny_qmodel):
    return load_weights(tiny_qmodel, "qmodel")


@pytest.fixture(scope="module")
def data(tiny_folder):
    return load_data(Namespace(dataset="folder", data_dir=tiny_folder, image_size=None, val_size=None))


@pytest.fixture(scope="module")
def batches(weights, data):
    return Batches(data.train, weights.normalization, 27, shuffle=True)


@pytest.fixture(scope="module")
def reference(weights):
    return fold_batch_norms(weights.model)


@pytest.fixture(scope="module")
def calibrated(weights, batches):
    use_engine(ENGINES[0])
    return calibrate(weights.model, batches)


@torch.no_grad()
def errors_of(model, reference, images):
    return model(images) - reference(images)


@pytest.mark.parametrize("name", ENGINES)
def test_images_never_seen_are_answered_more_as_float_does(
    weights, data, batches, reference, calibrated, name
):
    use_engine(name)
    images = normalize(data.test.images, weights.normalization)
    for per_channel in (False, True):
        model = post_training_quantize(calibrated, per_channel, weight_bits=5)
        before = errors_of(model, reference, images)
        assert correct_biases(model, reference, batches) is model
        after = errors_of(model, reference, images)
        assert after.square().mean() < 0.8 * before.square().mean()


def test_the_mean_error_of_each_logit_is_gone(batches, reference, calibrated):
    images = torch.cat([images for images, _ in batches])
    model = post_training_quantize(calibrated, per_channel=False, weight_bits=5)
    before = errors_of(model, reference, images).mean(0).abs()
    correct_biases(model, reference, [(images, None)])
    after = errors_of(model, reference, images).mean(0).abs()
    # Half a step is what rounding the logits may leave, and another what rounding the biases may.
    assert after.max() < model.classifier[-1].scale < before.max() / 2


def test_later_batches_count_less(batches, reference, calibrated):
    """So that the biases settle, whichever batch comes last."""
    first, second = [batch for batch, _ in batches][:2]

    def biases_after(*images: torch.Tensor) -> torch.Tensor:
        model = post_training_quantize(calibrated, per_channel=False, weight_bits=5)
        correct_biases(model, reference, [(batch, None) for batch in images])
        return torch.cat([value for name, value in int8_parameters(model).items() if name.endswith("bias")])

    early = biases_after(first, second) - biases_after(first)
    late = biases_after(*[first] * 9, second) - biases_after(*[first] * 9)
    assert late.norm() < early.norm() / 2


def test_biases_alone_change_and_stay_whole_steps(batches, reference, calibrated):
    model = post_training_quantize(calibrated, per_channel=True)
    before = int8_parameters(model)
    correct_biases(model, reference, batches)
    after = int8_parameters(model)
    for name, value in before.items():
        assert name.endswith("bias") or torch.equal(value, after[name])
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    round_biases(model)
    assert all(torch.equal(value, after[name]) for name, value in int8_parameters(model).items())


def test_nothing_is_left_on_either_model(batches, reference, calibrated):
    state = copy.deepcopy(reference.state_dict())
    model = post_training_quantize(calibrated, per_channel=True)
    correct_biases(model, reference, batches)
    for module in (*model.modules(), *reference.modules()):
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
    correct_biases(int8, reference, batches)
    torch.testing.assert_close(int8_parameters(int8)[name][:2], before[:2])
