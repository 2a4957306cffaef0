"""What the tests share: running a script as a user does, a tiny data set, tiny weights."""

import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import script_process
from tests.script_process import REPOSITORY as REPOSITORY

TINY_CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_script():
    """Run a script from the repository's root and assert how it ends."""

    script_process.start_server()

    def run(*argv: object, expect: int = 0, **kwargs) -> subprocess.CompletedProcess:
        done = script_process.run(list(map(str, argv)), **kwargs)
        assert done.returncode == expect, f"{argv}\n{done.stdout}\n{done.stderr}"
        if expect == 2:
            assert "Traceback" not in done.stderr
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1, done.stderr
            assert lines[0].startswith("error:")
        return done

    return run


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Three classes told apart by their colour: 60 images a class in train, 30 in test."""
    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 30)):
        for channel, name in zip((2, 1, 0), TINY_CLASSES, strict=True):
            for index in range(count):
                pixels = random.integers(0, 160, (32, 32, 3))
                pixels[..., channel] += random.integers(20, 90)
                write_image(folder / split / name / f"{index:04d}.png", pixels.astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A narrow untrained model for `tiny_folder`, with batch-norm statistics that are not trivial."""
    from models import MobileNetV2
    from utils.checkpoints.weights import Weights, save_weights
    from utils.data.datasets import Normalization

    torch.manual_seed(0)
    model = MobileNetV2(num_classes=3, width_mult=0.1, output_stride=32)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    weights = Weights(
        model.eval(),
        class_names=TINY_CLASSES,
        normalization=Normalization((0.35, 0.35, 0.35), (0.2, 0.2, 0.2)),
    )
    save_weights(path, weights, Namespace())
    return path


@pytest.fixture(scope="session")
def tiny_qmodel(tiny_folder, tmp_path_factory) -> Path:
    """A narrow qmodel that has learned `tiny_folder`."""
    from models import MobileNetV2, MobileNetV2Quantization
    from utils.checkpoints.weights import Weights, save_weights
    from utils.data.datasets import load_data, measure_normalization
    from utils.data.loader import Loader
    from utils.training.loop import cross_entropy, train_one_epoch

    data = load_data(Namespace(dataset="folder", data_dir=tiny_folder, image_size=None, val_size=None))
    normalization = measure_normalization(data)
    torch.manual_seed(0)
    model = MobileNetV2(num_classes=3, width_mult=0.1, dropout=0.0, output_stride=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12 * 6)
    for epoch in range(12):
        batches = Loader(data.train, normalization, 27, shuffle=True, epoch=epoch)
        train_one_epoch(model, batches, optimizer, cross_entropy(), [schedule.step])
    path = tmp_path_factory.mktemp("qmodel") / "qmodel.pth"
    qmodel = MobileNetV2Quantization.from_float(model)
    save_weights(path, Weights(qmodel, "qmodel", TINY_CLASSES, normalization), Namespace())
    return path


@pytest.fixture(scope="session")
def tiny_scripted(run_script, tiny_folder, tiny_qmodel, tmp_path_factory) -> Path:
    """A folder with what post_training_quantization.py makes of `tiny_qmodel`, and record.json."""
    folder = tmp_path_factory.mktemp("scripted")
    run_script(
        *("post_training_quantization.py", "--weights", tiny_qmodel, "--output_dir", folder),
        *("--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1, "--latency_rounds", 3),
        *("--record", folder / "record.json"),
    )
    return folder


@pytest.fixture(scope="session")
def overflowing_weights(tiny_weights, tmp_path_factory) -> Path:
    """Weights that are finite, but whose answers are not."""
    path = tmp_path_factory.mktemp("overflowing") / "overflowing.pth"
    content = torch.load(tiny_weights, weights_only=True)
    for name, value in content["state_dict"].items():
        if name.endswith("weight"):
            value *= 1e30
    torch.save(content, path)
    return path
