import csv
import json
import shutil
import signal
import subprocess
from argparse import Namespace

import pytest
import torch
import torchvision
from torch import nn

from models import MobileNetV2
from tests import script_process
from tests.conftest import TINY_CLASSES
from utils.checkpoints.foreign import load_pretrained
from utils.checkpoints.weights import Weights, save_weights
from utils.common.errors import UserError
from utils.open_model import open_teacher
from utils.open_weights import open_weights
from utils.training.distillation import Ensemble

FAST = ("--width_mult", 0.1, "--output_stride", 32, "--batch_size", 32, "--threads", 1)


@pytest.fixture(scope="module")
def train(run_script, tiny_folder):
    def run(output, *argv, expect=0):
        data = ("--dataset", "folder", "--data_dir", tiny_folder)
        return run_script("train.py", *data, *FAST, "--output", output, *argv, expect=expect)

    return run


def test_it_learns_and_writes_what_it_says(train, tmp_path):
    output, record = tmp_path / "w" / "m.pth", tmp_path / "record.json"
    # At output stride 32 the last maps have one pixel, and what so small a batch learns is up to chance.
    recipe = ("--epochs", 8, "--batch_size", 16, "--lr", 0.02, "--ema", 0.9, "--output_stride", 16)
    printed = train(output, *recipe, "--record", record).stdout
    content = torch.load(output, weights_only=True)
    assert content["class_names"] == list(TINY_CLASSES)
    assert content["architecture"]["output_stride"] == 16
    assert content["arguments"]["ema"] == 0.9
    results = json.loads(record.read_text())["results"]
    assert len(results.pop("history")) == 8
    assert results == content["metrics"]
    assert results["test_accuracy_pct"] > 80
    assert f"test accuracy {results['test_accuracy_pct']:.2f} %" in printed
    with open(tmp_path / "w" / "m.history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("12345678")
    best = max(float(row["val_accuracy_pct"]) for row in rows)
    assert results["val_accuracy_pct"] == pytest.approx(best, abs=1e-5)
    assert float(rows[int(results["best_epoch"]) - 1]["val_accuracy_pct"]) == pytest.approx(best, abs=1e-5)
    assert not (tmp_path / "w" / "m.checkpoint.pth").exists()


def kill_after(epochs: int, output, argv, sign) -> subprocess.Popen:
    """Start train.py and send `sign` once `epochs` are in the history."""
    history = output.with_name(f"{output.stem}.history.csv")

    def ready() -> bool:
        return history.is_file() and len(history.read_text().splitlines()) > epochs

    return script_process.run_until(["train.py", *map(str, argv), "--output", str(output)], ready, sign)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_resumed_run_ends_with_the_same_weights(train, tiny_folder, tmp_path, sign):
    recipe = ("--epochs", 4, "--ema", 0.9, "--augment", "crop_flip_cutout", "--early_output_strides", "32:1")
    train(tmp_path / "whole.pth", *recipe)
    output = tmp_path / "resumed.pth"
    data = ("--dataset", "folder", "--data_dir", tiny_folder)
    process = kill_after(1, output, (*data, *FAST, *recipe), sign)
    assert not output.exists()
    assert output.with_name("resumed.checkpoint.pth").exists()
    if sign == signal.SIGINT:
        printed = process.stderr.read()
        assert process.returncode == 130, printed
        assert "--resume" in printed
    train(output, *recipe, expect=2)  # a checkpoint is not thrown away unasked
    train(output, *recipe, "--seed", 1, "--resume", expect=2)
    train(output, *recipe, "--resume")
    whole = torch.load(tmp_path / "whole.pth", weights_only=True)
    resumed = torch.load(output, weights_only=True)
    assert whole["metrics"] == resumed["metrics"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--epochs", 0), "--epochs"),
        (("--epochs", -1), "--epochs"),
        (("--lr", 0), "--lr"),
        (("--lr", "nan"), "--lr"),
        (("--batch_size", 0), "--batch_size"),
        (("--early_output_strides", "31:1"), "STRIDE:EPOCHS"),
        (("--early_output_strides", "32:30"), "leave at least one"),
        (("--weights", "nowhere.pth"), "does not exist"),
        (("--teacher", "nowhere.pth"), "does not exist"),
        (("--resume",), "no checkpoint"),
        (("--dataset", "folder", "--data_dir", "nowhere"), "nowhere"),
        (("--dropout", 1), "--dropout"),
        (("--lr", 1e6, "--optimizer", "sgd", "--scheduler", "none"), "lower --lr"),
        (("--optimiser", "sgd"), "unrecognized"),
    ],
)
def test_bad_arguments_are_refused(train, tmp_path, argv, says):
    output = tmp_path / "m.pth"
    assert says in train(output, *argv, expect=2).stderr
    assert not output.exists()


def test_an_int8_teacher_is_learned_from(train, tiny_scripted, tmp_path):
    argv = ("--epochs", 1)
    teacher = tiny_scripted / "mobilenetv2_ptq_per_channel.pt"
    alone, taught = tmp_path / "alone.pth", tmp_path / "taught.pth"
    train(alone, *argv)
    train(taught, *argv, "--teacher", teacher)
    one, other = (torch.load(path, weights_only=True) for path in (alone, taught))
    assert any(not torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    train(tmp_path / "again.pth", *argv, "--teacher", teacher)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in other["state_dict"].items())


def test_several_teachers_answer_as_one(train, tiny_scripted, tmp_path):
    pair = tuple(tiny_scripted / f"mobilenetv2_ptq_{form}.pt" for form in ("per_channel", "per_tensor"))
    kept = []
    for name, teachers in (("first", pair[:1]), ("both", pair), ("turned", pair[::-1])):
        output = tmp_path / f"{name}.pth"
        train(output, "--epochs", 1, "--teacher", *teachers)
        kept.append(torch.load(output, weights_only=True)["state_dict"])
    first, both, turned = kept
    assert all(torch.equal(value, turned[key]) for key, value in both.items())
    assert any(not torch.equal(value, both[key]) for key, value in first.items())
    refused = train(tmp_path / "m.pth", "--teacher", *pair, "nowhere.pth", expect=2)
    assert "nowhere.pth does not exist" in refused.stderr


RESNET18 = ("--model", "resnet18", "--width_mult", 1)


def test_a_resnet18_is_trained_to_teach_and_for_nothing_else(train, run_script, tiny_folder, tmp_path):
    teacher, further, taught = (tmp_path / f"{name}.pth" for name in ("teacher", "further", "taught"))
    train(teacher, "--epochs", 1, *RESNET18, "--optimizer", "muon")
    train(further, "--epochs", 1, *RESNET18, "--weights", teacher, "--lr", 1e-9, "--scheduler", "none")
    before, after = (open_weights(path, "resnet18") for path in (teacher, further))
    assert before.class_names == TINY_CLASSES
    for name, parameter in before.model.named_parameters():
        torch.testing.assert_close(after.model.get_parameter(name), parameter)

    train(taught, "--epochs", 1, "--teacher", teacher)
    assert open_weights(taught).model.architecture["width_mult"] == 0.1
    data = ("--dataset", "folder", "--data_dir", tiny_folder)
    printed = run_script("evaluate.py", *data, "--weights", teacher).stdout
    assert f"test accuracy {before.metrics['test_accuracy_pct']:.2f} %" in printed
    for refusing in (("--weights", teacher), (*RESNET18, "--weights", taught)):
        assert "is wanted here" in train(tmp_path / "m.pth", *refusing, expect=2).stderr
    packing = ("scripts/pack_weights.py", "--weights", teacher, "--o", tmp_path / "packed.npz")
    assert "a ResNet-18" in run_script(*packing, expect=2).stderr


@pytest.mark.parametrize("option", [("--pretrained",), ("--width_mult", 0.5)])
def test_a_resnet18_has_not_all_options_of_mobilenetv2(train, tmp_path, option):
    assert "resnet18" in train(tmp_path / "m.pth", *RESNET18, *option, expect=2).stderr


def test_an_ensemble_answers_the_mean():
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    torch.testing.assert_close(Ensemble([one, other])(x), (one(x) + other(x)) / 2)


def test_a_teacher_that_may_have_seen_the_val_images_is_refused(train, tiny_scripted, tmp_path):
    argv = ("--val_size", 3, "--teacher", tiny_scripted / "mobilenetv2_ptq_per_channel.pt")
    assert "--val_size" in train(tmp_path / "m.pth", *argv, expect=2).stderr


def test_an_int8_teacher_stays_on_the_cpu(tiny_qmodel, tiny_scripted):
    student = open_weights(tiny_qmodel, "qmodel")
    with pytest.raises(UserError, match="int8"):
        open_teacher([str(tiny_scripted / "mobilenetv2_ptq_per_channel.pt")], student, torch.device("meta"))


def test_existing_weights_are_kept(train, tmp_path):
    output = tmp_path / "m.pth"
    output.write_text("precious")
    assert "--force" in train(output, "--epochs", 1, expect=2).stderr
    assert output.read_text() == "precious"


def test_starting_from_weights_of_other_classes_is_refused(train, tmp_path):
    other = tmp_path / "other.pth"
    save_weights(other, Weights(MobileNetV2(5, 0.1)), Namespace())
    assert "num_classes 5" in train(tmp_path / "m.pth", "--weights", other, expect=2).stderr


def test_pretrained_takes_all_but_the_classifier(monkeypatch):
    """The download itself is torchvision's; what is fetched is stood in for."""
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v2()
    kind = type(torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2)
    monkeypatch.setattr(kind, "get_state_dict", lambda *_, **__: source.state_dict())
    model = MobileNetV2(num_classes=10)
    head = model.classifier[1].weight.clone()
    load_pretrained(model)
    assert torch.equal(model.features[18][0].weight, source.features[18][0].weight)
    assert torch.equal(model.classifier[1].weight, head)


def test_files_beside_the_output_are_not_overwritten(train, tmp_path):
    history = tmp_path / "m.history.csv"
    history.write_text("precious")
    assert "m.history.csv exists" in train(tmp_path / "m.pth", "--epochs", 1, expect=2).stderr
    assert history.read_text() == "precious"
    train(tmp_path / "m.v2", "--epochs", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.history.csv", "m.v2", "m.v2.history.csv"]
    assert history.read_text() == "precious"


@pytest.mark.parametrize("flag", ["--record", "--teacher", "--weights"])
def test_the_output_is_no_other_file_of_the_run(train, tiny_weights, tmp_path, flag):
    output = tmp_path / "m.pth"
    output.write_bytes(tiny_weights.read_bytes())
    assert "both name" in train(output, "--epochs", 1, flag, output, "--force", expect=2).stderr
    assert output.read_bytes() == tiny_weights.read_bytes()


def test_a_diverged_run_leaves_nothing_that_the_next_one_stumbles_over(train, tmp_path):
    output = tmp_path / "m.pth"
    recipe = ("--epochs", 3, "--scheduler", "none")
    assert "lower --lr" in train(output, *recipe, "--lr", 1e6, expect=2).stderr
    assert list(tmp_path.iterdir()) == []
    train(output, "--epochs", 1, "--force")


def test_one_image_of_one_last_pixel_per_step_is_refused(train, tmp_path):
    assert "--batch_size of at least 2" in train(tmp_path / "m.pth", "--batch_size", 1, expect=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_resumed_with_the_inputs_that_it_started_with(train, tiny_folder, tiny_weights, tmp_path):
    start, output = tmp_path / "start.pth", tmp_path / "m.pth"
    weights = open_weights(tiny_weights)
    save_weights(start, weights, Namespace())
    recipe = ("--epochs", 3, "--weights", start, "--width_mult", weights.model.architecture["width_mult"])
    kill_after(1, output, ("--dataset", "folder", "--data_dir", tiny_folder, *FAST, *recipe), signal.SIGKILL)
    other_images = shutil.copytree(tiny_folder, tmp_path / "images")
    first, second = sorted((other_images / "train").glob("*/*"))[:2]
    second.write_bytes(first.read_bytes())
    ended = train(output, *recipe, "--resume", "--data_dir", other_images, expect=2)
    assert "other training images" in ended.stderr
    with torch.no_grad():
        weights.model.features[0][0].weight.mul_(2)
    save_weights(start, weights, Namespace())
    assert "their content differs" in train(output, *recipe, "--resume", expect=2).stderr


def test_a_run_killed_between_its_record_and_the_end_is_resumed(train, tiny_folder, tmp_path):
    output, record, saved = tmp_path / "m.pth", tmp_path / "record.json", tmp_path / "saved"
    checkpoint = tmp_path / "m.checkpoint.pth"
    data = ("--dataset", "folder", "--data_dir", tiny_folder)
    kill_after(1, output, (*data, *FAST, "--epochs", 4), signal.SIGKILL)
    saved.write_bytes(checkpoint.read_bytes())
    run = ("--epochs", 4, "--record", record, "--resume")
    train(output, *run)
    checkpoint.write_bytes(saved.read_bytes())
    train(output, *run)
    checkpoint.write_bytes(saved.read_bytes())
    record.write_text("something else")
    assert "record.json exists" in train(output, *run, expect=2).stderr
    assert record.read_text() == "something else"
