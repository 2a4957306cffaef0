import csv

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from models import MobileNetV2
from tests import script_process
from tests.conftest import TINY_CLASSES, write_image


@pytest.fixture(scope="module")
def predict(run_script, tiny_scripted):
    def run(*argv, weights=tiny_scripted / "mobilenetv2_float.pt", expect=0, **kwargs):
        return run_script("predict.py", "--weights", weights, "--threads", 1, *argv, expect=expect, **kwargs)

    return run


@pytest.mark.parametrize("name", ["mobilenetv2_float.pt", "mobilenetv2_ptq_per_channel.pt", "qmodel"])
def test_each_image_gets_its_class(predict, tiny_folder, tiny_scripted, tiny_qmodel, name):
    weights = tiny_qmodel if name == "qmodel" else tiny_scripted / name
    lines = predict(tiny_folder / "test", weights=weights).stdout.splitlines()
    assert len(lines) == 90
    right = 0
    for line in lines:
        path, _, classes = line.partition(": ")
        found = [cell.rsplit(" ", 2) for cell in classes.split(", ")]
        assert {label for label, _, _ in found} == set(TINY_CLASSES)
        percents = [float(percent) for _, percent, _ in found]
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=0.03)
        right += found[0][0] == path.split("/")[-2]
    assert right > 70


def test_the_csv_has_the_same_numbers(predict, tiny_folder, tmp_path):
    folder, table = tiny_folder / "test" / "red", tmp_path / "out.csv"
    printed = predict(folder, "--top_k", 2).stdout.splitlines()
    assert "wrote" in predict(folder, "--top_k", 2, "--csv", table, "--batch_size", 7).stdout
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class_1", "percent_1", "class_2", "percent_2"]
    for row, line in zip(rows, printed, strict=True):
        assert line.startswith(f"{row['path']}: {row['class_1']} {float(row['percent_1']):.2f} %, ")
    assert "--force" in predict(folder, "--csv", table, expect=2).stderr


def test_photos_of_every_mode_and_orientation(predict, tmp_path):
    pixels = np.zeros((50, 80, 3), np.uint8)
    pixels[..., 0] = 200
    pixels[:25, :, 1] = 90
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.convert("RGBA").save(tmp_path / "b.png")
    image.convert("P").save(tmp_path / "c.png")
    image.convert("L").save(tmp_path / "d.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "e.png", exif=exif)
    lines = [line.partition(": ")[2] for line in predict(tmp_path, "--top_k", 3).stdout.splitlines()]
    assert len(lines) == 5
    assert lines[0] == lines[1] == lines[4]


def run_with_errors(weights, *argv):
    argv = ("predict.py", "--weights", weights, "--threads", 1, *argv)
    done = script_process.run(list(map(str, argv)))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done


def test_what_is_no_image_is_told_after_the_others(predict, tiny_scripted, tmp_path):
    for name in ("a.png", "z.png"):
        write_image(tmp_path / name, np.full((8, 8, 3), 100, np.uint8))
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("skipped")
    done = run_with_errors(tiny_scripted / "mobilenetv2_float.pt", tmp_path, "nowhere.png")
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / name) for name in ("a.png", "z.png")
    ]
    note, unreadable, missing, last = done.stderr.splitlines()
    assert "1 other files" in note
    assert "b.png cannot be read" in unreadable
    assert "nowhere.png does not exist" in missing
    assert "2 of 4 images could not be read" in last


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("EMPTY",), "holds no images"),
        (("EMPTY", "--top_k", 0), "--top_k"),
        ((), "required"),
    ],
)
def test_bad_arguments_are_refused(predict, tmp_path, argv, says):
    argv = [tmp_path if arg == "EMPTY" else arg for arg in argv]
    assert says in predict(*argv, expect=2).stderr


def test_a_bare_state_dict_needs_its_normalization(predict, tiny_folder, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(MobileNetV2(num_classes=3, width_mult=0.1, output_stride=32).eval().state_dict(), bare)
    flags = (tiny_folder / "test" / "red", "--output_stride", 32)
    assert "give --normalization" in predict(*flags, weights=bare, expect=2).stderr
    given = ("--normalization", 0.5, 0.5, 0.5, 0.25, 0.25, 0.25)
    assert "class 0 " in predict(*flags, *given, weights=bare).stdout


def test_answers_that_are_not_finite_are_refused(predict, overflowing_weights, tiny_folder, tmp_path):
    csv_file = tmp_path / "out.csv"
    done = predict(tiny_folder / "test", "--csv", csv_file, weights=overflowing_weights, expect=2)
    assert "answers with NaN" in done.stderr
    assert not csv_file.exists()


def test_no_image_of_a_folder_is_overwritten(predict, tmp_path):
    image = tmp_path / "a.png"
    write_image(image, np.zeros((32, 32, 3), np.uint8))
    before = image.read_bytes()
    assert "both name" in predict(tmp_path, "--csv", image, "--force", expect=2).stderr
    assert image.read_bytes() == before
