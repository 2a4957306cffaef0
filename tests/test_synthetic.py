import hashlib

import pytest
import torch
from torch import nn

from utils.data.datasets import Normalization, Split, synthetic
from utils.data.loader import Loader


@pytest.fixture(scope="module")
def drawn():
    return synthetic.load(None)


def sha256(images):
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_the_bytes_are_the_same_on_every_machine(drawn):
    (train, _), (test, _), _ = drawn
    assert sha256(train) == "1163169a79da8a9dd9515f5938b2d5338e9e47cebbaced046a1a038cc6e09d0a"
    assert sha256(test) == "623b71f655277e9d40bad546f34570c18c586c5379b42705d87816313e7c4bac"


def test_drawing_again_gives_the_same_whatever_the_seed(drawn):
    torch.manual_seed(123)
    (_, _), (test, labels), _ = synthetic.load("no such folder")
    assert torch.equal(test, drawn[1][0])
    assert torch.equal(labels, drawn[1][1])


def test_sizes_types_and_names(drawn):
    (train, train_labels), (test, test_labels), names = drawn
    assert train.shape == (6000, 32, 32, 3)
    assert test.shape == (2000, 32, 32, 3)
    assert train.dtype == test.dtype == torch.uint8
    assert train_labels.dtype == test_labels.dtype == torch.int64
    assert len(set(names)) == 10
    assert set(names) == {*synthetic.OUTLINES, *synthetic.TEXTURES}


def test_any_ten_images_in_a_row_hold_every_class(drawn):
    for _, labels in drawn[:2]:
        for start in (0, 7, 1234):
            assert sorted(labels[start : start + 10].tolist()) == list(range(10))


def test_no_image_is_drawn_twice(drawn):
    images = torch.cat([drawn[0][0], drawn[1][0]]).flatten(1).numpy()
    assert len({image.tobytes() for image in images}) == 8000


def test_a_linear_classifier_of_pixels_is_poor(drawn):
    (train, labels), (test, test_labels), _ = drawn
    train, test = (images.flatten(1).float() / 255 - 0.35 for images in (train, test))
    targets = nn.functional.one_hot(labels, 10).float()
    weights = torch.linalg.solve(train.T @ train + 1000 * torch.eye(3072), train.T @ targets)
    accuracy_pct = 100 * ((test @ weights).argmax(1) == test_labels).float().mean().item()
    assert 10 < accuracy_pct < 30


def test_a_small_net_learns_it_in_three_epochs(drawn):
    train, test = (Split(images.permute(0, 3, 1, 2), labels) for images, labels in drawn[:2])
    normalization = Normalization((0.35, 0.35, 0.35), (0.25, 0.25, 0.25))
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(3):
        for images, labels in Loader(train, normalization, 64, shuffle=True, epoch=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    with torch.inference_mode():
        model.eval()
        hits = [(model(x).argmax(1) == y).sum() for x, y in Loader(test, normalization, 500)]
    assert 60 < 100 * sum(hits).item() / len(test) < 99
