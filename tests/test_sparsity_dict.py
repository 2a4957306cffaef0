import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import MobileNetV2
from models.statistics import LayerStatistics, prunable_layers
from utils.common.errors import UserError
from utils.pruning.sparsity_dict import describe_layers, read_sparsity_dict, write_sparsity_dict

LAYERS = ("features.0.0", "features.1.conv.0.0", "classifier.1")
GOOD = "layer,sparsity\nfeatures.0.0,1.0\nfeatures.1.conv.0.0,0.25\nclassifier.1,0\n"
EXPECTED = {"features.0.0": 1.0, "features.1.conv.0.0": 0.25, "classifier.1": 0.0}


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes) -> dict[str, float]:
        path = tmp_path / "s.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_sparsity_dict(path, LAYERS)

    return read


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace(",", " , ").replace("\n", "  \n"),
        GOOD.rstrip("\n"),
        "\n" + GOOD.replace("\n", "\n\n") + ",\n",
        'sparsity,shape,layer\n"1.0",8x3x3x3,features.0.0\n2.5e-1,,features.1.conv.0.0\n.0,?,"classifier.1"\n',
        "layer,sparsity\nclassifier.1,0\nfeatures.1.conv.0.0,0.25\nfeatures.0.0,1\n",
        GOOD.replace("sparsity", "keep_ratio"),
        "keep_ratio,layer\n1,features.0.0\n0.25,features.1.conv.0.0\n0,classifier.1\n",
        GOOD.replace(",", ";"),
        GOOD.replace(",", ";").replace("1.0", "1,0").replace("0.25", "0,25"),
        "\n" + GOOD.replace(",", "\t").replace("0.25", "0,25"),
    ],
    ids=[
        "plain",
        "crlf",
        "bom",
        "spaces",
        "no_last_newline",
        "blank_lines",
        "columns",
        "rows",
        "keep_ratio",
        "keep_ratio_first",
        "semicolons",
        "decimal_commas",
        "tabs",
    ],
)
def test_good_files_in_forward_order(read, content):
    keep_ratios = read(content)
    assert keep_ratios == EXPECTED
    assert list(keep_ratios) == list(LAYERS)


BAD = {
    "empty": ("", "is empty"),
    "only_blank": (" \n\n", "is empty"),
    "header_alone": ("layer,sparsity\n", "no rows"),
    "no_such_column": (GOOD.replace("sparsity", "keep"), "has no column sparsity (it has layer, keep)"),
    "two_such_columns": ("layer,sparsity,sparsity\nfeatures.0.0,1,1\n", "two columns sparsity"),
    "both_names": (
        "layer,sparsity,keep_ratio\nfeatures.0.0,1,1\n",
        "two columns sparsity and keep_ratio: remove one",
    ),
    "other_name_twice": ("layer,keep_ratio,keep_ratio\nfeatures.0.0,1,1\n", "two columns keep_ratio: remove"),
    "fault_under_the_other_name": (
        GOOD.replace("sparsity", "keep_ratio").replace("0.25", "25%"),
        "line 3, column keep_ratio: '25%' for features.1.conv.0.0 is a percentage",
    ),
    "unknown_layer": (
        GOOD.replace("features.1.conv.0.0", "features.1.conv.00"),
        "line 3, column layer: the model has no layer 'features.1.conv.00': "
        "did you mean features.1.conv.0.0?",
    ),
    "foreign_layer": (
        GOOD.replace("classifier.1", "zzz"),
        "line 4, column layer: the model has no layer 'zzz'",
    ),
    "layer_missing": (GOOD.replace("classifier.1,0\n", ""), "no row for layer classifier.1:"),
    "layers_missing": ("layer,sparsity\nclassifier.1,0\n", "no row for layer features.0.0 and 1 more:"),
    "duplicate_layer": (
        GOOD + "features.0.0,0.5\n",
        "line 5, column layer: features.0.0 already has a row in line 2",
    ),
    "not_a_number": (
        GOOD.replace("0.25", "half"),
        "line 3, column sparsity: 'half' for features.1.conv.0.0 is not a number",
    ),
    "no_number": (GOOD.replace("0.25", ""), "line 3, column sparsity: no number for features.1.conv.0.0"),
    "nan": (GOOD.replace("0.25", "NaN"), "line 3, column sparsity: 'NaN'"),
    "below": (
        GOOD.replace("0.25", "-0.1"),
        "line 3, column sparsity: '-0.1' for features.1.conv.0.0 is outside [0, 1]",
    ),
    "above": (GOOD.replace("0.25", "1.0001"), "'1.0001' for features.1.conv.0.0 is outside [0, 1]"),
    "infinite": (GOOD.replace("0.25", "inf"), "outside [0, 1]"),
    "percent": (GOOD.replace("0.25", "25%"), "is a percentage: write a fraction"),
    "decimal_comma": (GOOD.replace("0.25", "0,25"), "line 3 has 3 cells, the header has 2"),
    "quoted_comma": (GOOD.replace("0.25", '"0,25"'), "write a decimal point, as in 0.5"),
    "underscore": (GOOD.replace("0.25", "0_1"), "'0_1' for features.1.conv.0.0 is not a number"),
    "short_row": (GOOD.replace(",0.25", ""), "line 3 has 1 cells, the header has 2"),
    "open_quote": (GOOD.replace("0.25", '"0.25'), "is not CSV"),
    "utf16": (GOOD.encode("utf-16"), "not text in UTF-8"),
    "image": (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "not text in UTF-8"),
    "nul": (GOOD.replace("0.25", "\0"), "line 3"),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_named_in_one_line(read, tmp_path, fault):
    content, says = BAD[fault]
    with pytest.raises(UserError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "s.csv"))
    assert says in message
    assert len(message.splitlines()) == 1


def test_a_scanning_log_is_named_with_its_converter(read):
    log = "layer,sparsity,recommended_sparsity\nfeatures.0.0,0.5,\nfeatures.0.0,0.7,0.7\n"
    with pytest.raises(
        UserError, match=r"is a scanning log: .* scripts/scanning_log_to_sparsity_dict_template"
    ):
        read(log)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="sparsity dict"):
            read_sparsity_dict(path, LAYERS)


@settings(deadline=None, max_examples=50)
@given(ratios=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_written_numbers_come_back_to_the_last_bit(tmp_path_factory, ratios):
    path = tmp_path_factory.mktemp("csv") / "s.csv"
    keep_ratios = dict(zip(LAYERS, ratios, strict=True))
    layers = [LayerStatistics(name, (8, 3, 3, 3), 216, 216, 1000) for name in LAYERS]
    write_sparsity_dict(path, keep_ratios, describe_layers(layers))
    assert read_sparsity_dict(path, LAYERS) == keep_ratios


def template(run_script, path: Path, *argv) -> list[dict[str, str]]:
    printed = run_script("scripts/generate_sparsity_dict_template.py", "--o", path, *argv).stdout
    assert "sparsity is the fraction of weights KEPT" in printed
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_template_has_every_layer_in_forward_order(run_script, tmp_path):
    rows = template(run_script, tmp_path / "s.csv", "--output_stride", 32)
    model = MobileNetV2(output_stride=32)
    order = []
    for name, layer in prunable_layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert [row["layer"] for row in rows] == order
    assert {row["sparsity"] for row in rows} == {"1.0"}
    assert rows[0] == {
        "layer": "features.0.0",
        "sparsity": "1.0",
        "shape": "32x3x3x3",
        "parameters": "864",
        "macs": str(864 * 16 * 16),
    }
    weights = sum(int(row["parameters"]) for row in rows)
    others = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert weights + others == 2_236_682


def test_the_template_of_a_weights_file(run_script, tiny_weights, tmp_path):
    rows = template(run_script, tmp_path / "s.csv", "--weights", tiny_weights)
    assert rows[-1]["shape"] == "3x1280"
    assert rows[0]["macs"] == str(8 * 27 * 16 * 16)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--weights", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--weights", "WEIGHTS", "--num_classes", 10), "--num_classes"),
        (("--weights", "WEIGHTS", "--image_size", 64), "--image_size"),
        (("--num_classes", 0), "--num_classes"),
        (("--width_mult", -1), "--width_mult"),
        (("--o", "/proc/none/s.csv"), "/proc/none/s.csv cannot be written"),
    ],
)
def test_bad_arguments_of_the_template(run_script, tiny_weights, tmp_path, argv, says):
    argv = [tiny_weights if arg == "WEIGHTS" else arg for arg in argv]
    script = "scripts/generate_sparsity_dict_template.py"
    assert says in run_script(script, "--o", tmp_path / "s.csv", *argv, expect=2).stderr
    assert not (tmp_path / "s.csv").exists()


def test_an_edited_csv_is_not_overwritten(run_script, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("precious")
    script = "scripts/generate_sparsity_dict_template.py"
    assert "--force" in run_script(script, "--o", path, expect=2).stderr
    assert path.read_text() == "precious"
    run_script(script, "--o", path, "--force")
    assert path.read_text().startswith("layer,sparsity,shape,parameters,macs\nfeatures.0.0,1.0,")
