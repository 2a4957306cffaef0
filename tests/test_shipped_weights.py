"""The weights that come with the repository are those that results/ and the README report."""

import json

import pytest

from tests.conftest import REPOSITORY
from utils.open_model import open_model
from utils.open_weights import open_weights

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize(
    ("name", "training", "evaluated", "output_stride"),
    [
        ("mobilenetv2_cifar10.pth", "float", "float", 8),
        ("mobilenetv2_cifar10_pruned.pth", "prune_271", "pruned_271", 8),
        (
            "mobilenetv2_cifar10_os16.npz",
            "float_os16_longer",
            "packed_float16_at_output_stride_16",
            16,
        ),
    ],
)
def test_they_are_the_ones_that_were_measured(name, training, evaluated, output_stride):
    path = REPOSITORY / "weights" / name
    trained, measured = (
        json.loads((REPOSITORY / f"results/{record}.json").read_text())["results"]
        for record in (training, f"evaluate/{evaluated}")
    )
    weights, file = open_weights(path), open_model(path)
    assert weights.class_names == CLASSES
    assert weights.model.architecture["output_stride"] == output_stride
    assert weights.metrics.items() <= trained.items()
    assert weights.metrics["test_accuracy_pct"] == pytest.approx(measured["accuracy_pct"], abs=0.05)
    assert (file.metadata.parameters, file.metadata.nonzeros) == (
        measured["parameters"],
        measured["nonzeros"],
    )


def test_the_pruned_one_keeps_the_published_share_of_the_weights():
    assert open_model(REPOSITORY / "weights/mobilenetv2_cifar10_pruned.pth").metadata.density <= 0.2711
