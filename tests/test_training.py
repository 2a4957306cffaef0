from argparse import Namespace

import pytest
import torch
from torch import nn

from models import MobileNetV2
from train import get_args_parser, output_stride_by_epoch
from utils.common.errors import UserError
from utils.data.datasets import ImageData, Normalization, Split
from utils.data.loader import Loader
from utils.training.arguments import build_run, start_training, training_loader
from utils.training.checkpoint import RunConfig
from utils.training.kernels.layers import use_fast_layers
from utils.training.loop import Run, accuracy_on_val, cross_entropy, fit, train_one_epoch
from utils.training.muon import Muon
from utils.training.optimization import ExponentialMovingAverage, build_optimizer, build_scheduler


def options(*argv: str) -> Namespace:
    return get_args_parser().parse_args(argv)


def small_model(**kwargs) -> MobileNetV2:
    torch.manual_seed(1)
    return MobileNetV2(num_classes=3, width_mult=0.1, dropout=0.0, **kwargs)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_is_only_on_matrices_and_filters(name):
    model = small_model()
    optimizer = build_optimizer(model, name, lr=0.2, weight_decay=0.01)
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    weights = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {f"{n}.weight" for n in weights}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_one_cycle_rises_to_lr_and_ends_near_zero():
    optimizer = build_optimizer(small_model(), "sgd", lr=0.4, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, "one_cycle", 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.4 / 25)
    assert max(rates) == pytest.approx(0.4, rel=1e-3)
    assert 25 <= rates.index(max(rates)) <= 35
    assert rates[-1] < 1e-3


def test_the_published_schedule_is_constant():
    optimizer = build_optimizer(small_model(), "adam", lr=1e-4, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, "none", 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 1e-4


def test_average_follows_the_formula():
    model = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(model, decay=0.5)
    values, expected = [3.0, 7.0, -2.0], None
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked.fill_(step)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert average.module.weight[0].item() == pytest.approx(expected, rel=1e-6)
    assert average.module.running_mean[1].item() == pytest.approx(expected, rel=1e-6)
    assert average.module.num_batches_tracked == 2


@pytest.mark.parametrize("make_fast", [lambda model: None, use_fast_layers])
def test_train_one_epoch_counts_as_a_plain_loop_does(make_fast):
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.randint(3, (50,)))
    batches = Loader(split, Normalization((0.5,) * 3, (0.25,) * 3), 16, shuffle=True, epoch=1)
    ours, plain = small_model(output_stride=32), small_model(output_stride=32)
    make_fast(ours)
    calls = []
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-4)
    loss, accuracy_pct = train_one_epoch(
        ours, batches, optimizer, cross_entropy(0.1), [lambda: calls.append(1)]
    )

    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    plain.train()
    losses, correct = [], 0
    for images, labels in batches:
        optimizer.zero_grad()
        logits = plain(images)
        value = criterion(logits, labels)
        value.backward()
        optimizer.step()
        losses.append(value.item() * len(labels))
        correct += (logits.argmax(1) == labels).sum().item()
    assert len(calls) == 4
    assert loss == pytest.approx(sum(losses) / 50, rel=1e-4)
    assert accuracy_pct == pytest.approx(100 * correct / 50)


def test_early_output_strides_make_the_epochs_plan():
    args = options("--epochs", "5", "--early_output_strides", "32:2", "16:1", "--output_stride", "8")
    assert output_stride_by_epoch(args) == [32, 32, 16, 8, 8]
    with pytest.raises(UserError, match="leave at least one"):
        output_stride_by_epoch(options("--epochs", "3", "--early_output_strides", "32:3"))


def tiny_run(config: RunConfig, **parts) -> Run:
    """Four epochs of three steps, without a command line."""
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8), torch.randint(3, (24,)))
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3)
    )
    optimizer = build_optimizer(model, "sgd", lr=0.1, weight_decay=5e-4)
    return Run(
        config=config,
        model=model,
        loader=Loader(split, normalization, 8, shuffle=True, augment="crop_flip"),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, "one_cycle", 12),
        epochs=4,
        loss_function=cross_entropy(),
        val_accuracy=accuracy_on_val(ImageData(split, split, split, ("a", "b", "c")), normalization),
        average=ExponentialMovingAverage(model, 0.9),
        **parts,
    )


def config(tmp_path, name: str = "m.pth", resume: bool = False, **flags) -> RunConfig:
    return RunConfig(tmp_path / name, resume, False, 0, {"lr": 0.1, "resume": resume, **flags})


def test_an_interrupted_run_is_resumed_bit_for_bit(tmp_path):
    def interrupt(epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    whole = tiny_run(config(tmp_path, "whole.pth"))
    expected = fit(whole)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 4 epochs are in .*m\.checkpoint\.pth"):
        fit(tiny_run(config(tmp_path), before_epoch=[interrupt]))
    resumed = tiny_run(config(tmp_path, resume=True))
    progress = fit(resumed)
    assert progress.metrics() == expected.metrics()
    assert [row.loss for row in progress.history] == [row.loss for row in expected.history]
    for one, other in ((whole.model, resumed.model), (whole.selected, resumed.selected)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    for name, value in expected.best_state.items():
        assert torch.equal(resumed.selected.state_dict()[name], value), name


def test_a_checkpoint_of_other_flags_is_refused_unless_they_are_free_or_new(tmp_path):
    fit(tiny_run(config(tmp_path, threads=1)))
    with pytest.raises(UserError, match=r"was made with --lr 0\.1, not 0\.2"):
        fit(tiny_run(config(tmp_path, resume=True, lr=0.2)))
    assert len(fit(tiny_run(config(tmp_path, resume=True, threads=2, newer="x"))).history) == 4


def test_without_val_images_the_last_epoch_is_the_best(tmp_path):
    run = tiny_run(config(tmp_path))
    run.val_accuracy = lambda model: None
    assert fit(run).metrics() == {"best_epoch": 4, "val_accuracy_pct": None}


def test_a_run_is_assembled_from_the_flags(tmp_path):
    args = options("--optimizer", "muon", "--muon_lr", "0.03", "--lr", "0.1", "--amp", "--epochs", "7")
    args.output, args.batch_size = str(tmp_path / "m.pth"), 16
    split = Split(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.zeros(50, dtype=torch.long))
    data = ImageData(split, split, split, ("a", "b", "c"))
    model = small_model()
    loader = training_loader(data, Normalization((0.5,) * 3, (0.25,) * 3), args, limit=2)
    run = build_run(model, loader, None, lambda model: None, args, first_selectable_epoch=3)
    assert (len(loader), loader.drop_last, loader.shuffle, loader.augment) == (2, True, True, "crop_flip")
    assert isinstance(run.optimizer, Muon)
    assert [round(group["max_lr"], 9) for group in run.optimizer.param_groups] == [0.03, 0.1, 0.1]
    assert run.scheduler.total_steps == 7 * 2 + 1
    assert (run.epochs, run.first_selectable_epoch, run.amp, run.compile) == (7, 3, True, False)
    assert run.selected is model
    assert run.config.checkpoint == tmp_path / "m.checkpoint.pth"
    assert run.config.flags["muon_lr"] == 0.03


@pytest.mark.parametrize("flag", ["amp", "compile"])
def test_what_a_flag_needs_is_checked_only_when_it_is_given(monkeypatch, tmp_path, flag):
    asked = []
    monkeypatch.setattr("utils.training.arguments.check_amp", lambda device: asked.append("amp"))
    monkeypatch.setattr("utils.training.arguments.check_compiler", lambda device: asked.append("compile"))
    argv = ("--output", str(tmp_path / "m.pth"), "--device", "cpu")
    start_training(options(*argv))
    assert asked == []
    start_training(options(*argv, f"--{flag}"))
    assert asked == [flag]
