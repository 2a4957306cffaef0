from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from models import MobileNetV2Quantization
from models.folding import folded_weights
from models.statistics import LAYER_KINDS, layer_kind, prunable_layers
from scripts.pack_weights import source_of
from utils.checkpoints.weights import Weights, save_weights
from utils.open_model import open_model
from utils.open_weights import open_weights
from utils.packing.pack import encode, packed_sizes
from utils.plots import has_batch_norms, layer_weights, plot_model
from utils.pruning.pruner import FineGrainedPruner

SCRIPT = "scripts/plot_model.py"


@pytest.fixture(scope="module")
def pruned(tiny_weights, tmp_path_factory):
    """The tiny model at 0.3 of each layer but one, which is empty."""
    weights = open_weights(tiny_weights)
    ratios = dict.fromkeys(prunable_layers(weights.model), 0.3) | {"features.3.conv.1.0": 0.0}
    FineGrainedPruner(weights.model, ratios).apply()
    path = tmp_path_factory.mktemp("pruned") / "pruned.pth"
    save_weights(path, weights, Namespace())
    return path


def check_picture(path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def printed_bytes(text: str) -> dict[str, int]:
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) == 3 and row[1].isdecimal()}


def test_a_pruned_file_beside_the_dense_one(run_script, pruned, tiny_weights, tmp_path):
    output = tmp_path / "m.png"
    argv = (SCRIPT, "--weights", pruned, "--before", tiny_weights, "--o", output)
    printed = run_script(*argv).stdout
    check_picture(output)
    assert not printed_bytes(printed)
    assert f"wrote {output}" in printed
    first = output.read_bytes()
    assert "--force" in run_script(*argv, expect=2).stderr
    assert output.read_bytes() == first


def test_a_packed_int8_file_beside_its_qmodel(run_script, tiny_scripted, tiny_qmodel, tmp_path):
    output, packed = tmp_path / "m.png", tmp_path / "packed.npz"
    packed.write_bytes(encode(*source_of(open_model(tiny_scripted / "mobilenetv2_ptq_per_channel.pt"), None)))
    printed = run_script(SCRIPT, "--weights", packed, "--before", tiny_qmodel, "--o", output).stdout
    check_picture(output)
    assert printed_bytes(printed)["all"] == packed.stat().st_size


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_a_packed_file_holds(pruned, tiny_scripted, tmp_path, kind):
    source = pruned if kind == "float" else tiny_scripted / "mobilenetv2_ptq_per_channel.pt"
    packed = tmp_path / "packed.npz"
    packed.write_bytes(encode(*source_of(open_model(source), "float16" if kind == "float" else None)))
    file = open_model(packed)
    sizes = packed_sizes(packed)
    assert sizes["bytes"].sum() == packed.stat().st_size
    only = {"batch_norm"} if kind == "float" else {"scales"}
    assert {"values", "biases", "header"} | only <= set(sizes["kind"])
    assert not {"batch_norm", "scales"} - only & set(sizes["kind"])
    expected = layer_weights(open_model(source))
    for name, weight in layer_weights(file).items():
        np.testing.assert_allclose(weight, expected[name], rtol=2**-10, atol=1e-4)


def test_weights_of_every_kind_of_file(tiny_scripted, tiny_qmodel):
    qmodel = open_model(tiny_qmodel)
    assert has_batch_norms(qmodel)
    plain = layer_weights(qmodel)
    assert all(
        np.array_equal(plain[name], layer.weight.detach())
        for name, layer in prunable_layers(qmodel.model).items()
    )
    folded = layer_weights(qmodel, fold=True)
    assert not np.array_equal(folded["features.1.conv.1"], plain["features.1.conv.1"])
    for variant in ("float", "ptq_per_tensor", "ptq_per_channel"):
        file = open_model(tiny_scripted / f"mobilenetv2_{variant}.pt")
        assert not has_batch_norms(file)
        found = layer_weights(file, fold=True)
        assert list(found) == list(plain)
        assert all(weight.dtype == np.float32 for weight in found.values())
        if variant != "float":
            # The real values of no more than 255 quantized ones per channel.
            assert all(len(np.unique(channel)) <= 255 for weight in found.values() for channel in weight)
        nonzeros = sum(int(np.count_nonzero(weight)) for weight in found.values())
        # The rest are biases, of which a model that has learned has no zeros.
        channels = sum(len(weight) for weight in found.values())
        assert 0 <= file.metadata.nonzeros - nonzeros <= channels
        np.testing.assert_allclose(found["features.18.0"], folded["features.18.0"], rtol=0.1, atol=0.05)


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draw and give the figure instead of its pixels."""
    drawn = SimpleNamespace()

    def keep(self, path, **_):
        drawn.axes = self.axes
        drawn.title = self.get_suptitle()
        path.write_bytes(b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)

    def draw(*args):
        plot_model(tmp_path / "m.png", *args)
        return drawn

    return draw


def test_what_is_drawn(figure, pruned, tiny_weights):
    after, before = (layer_weights(open_model(path)) for path in (pruned, tiny_weights))
    kinds = ("values", "positions", "header")
    sizes = pd.DataFrame(
        [(name, kind, 1024 * (i + j)) for i, name in enumerate(after) for j, kind in enumerate(kinds[:2])]
        + [("", "header", 2048)],
        columns=["layer", "kind", "bytes"],
    )
    drawn = figure("the title", after, sizes, {"before": before, "after": after})
    assert drawn.title == "the title"
    density, count, size, *panels = drawn.axes
    heights = [bar.get_height() for bar in density.patches[:53]]
    assert heights == [100 * np.count_nonzero(weight) / weight.size for weight in after.values()]
    assert heights[7] == 0.0
    counts = [bar.get_height() for bar in count.patches[:106]]
    assert counts[:53] == [weight.size for weight in after.values()]
    assert counts[53:] == [np.count_nonzero(weight) for weight in after.values()]
    assert [label.get_text() for label in size.get_xticklabels()] == [
        name.removeprefix("features.") for name in after
    ]
    assert [bar.get_height() for bar in size.patches[:106]] == [*range(53), *range(1, 54)]
    for panel, kind in zip(panels, LAYER_KINDS, strict=True):
        total = sum(weight.size for name, weight in before.items() if layer_kind(name, weight.shape) == kind)
        assert f"{kind}: {total:,}" in panel.get_title()
        assert "before: 100.0 % not zero (grey)" in panel.get_xlabel()
    assert "after: 30.0 % not zero" in panels[0].get_xlabel()


def test_an_empty_model_is_drawn(figure, tiny_weights):
    empty = {name: np.zeros(weight.shape) for name, weight in layer_weights(open_model(tiny_weights)).items()}
    drawn = figure("empty", empty, None, {"weights": empty})
    assert not any(bar.get_height() for bar in drawn.axes[0].patches[:53])
    assert "weights: 0.0 % not zero" in drawn.axes[2].get_xlabel()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--weights", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--weights", "README.md"), "README.md"),
        (("--before", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--o", "/proc/none/m.png"), "cannot be written"),
    ],
)
def test_bad_arguments_are_refused(run_script, tiny_weights, tmp_path, argv, says):
    error = run_script(SCRIPT, "--weights", tiny_weights, "--o", tmp_path / "m.png", *argv, expect=2).stderr
    assert says in error
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_before_is_refused(run_script, tiny_weights, tmp_path):
    other = tmp_path / "other.pth"
    qmodel = MobileNetV2Quantization(num_classes=3, width_mult=0.25)
    save_weights(other, Weights(qmodel, "qmodel"), Namespace())
    argv = (SCRIPT, "--weights", tiny_weights, "--before", other, "--o", tmp_path / "m.png")
    error = run_script(*argv, expect=2).stderr
    assert f"{other} is of another architecture: features.7.conv.2 is (16, 48, 1, 1) there" in error
    assert not (tmp_path / "m.png").exists()


def test_folding_is_what_the_batch_norm_does(tiny_weights):
    model = open_weights(tiny_weights).model
    norm = model.features[0][1]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    expected = model.features[0][0].weight.detach() * scale[:, None, None, None]
    torch.testing.assert_close(folded_weights(model)["features.0.0"], expected)
