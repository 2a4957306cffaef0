from argparse import Namespace

import pytest
import torch
from torch import nn

from quantization_aware_training import DEVICES as QAT_DEVICES
from utils.common.devices import DEVICES, choose_device, device_of, on_device
from utils.common.errors import UserError
from utils.training.kernels import build
from utils.training.precision import check_amp


@pytest.fixture
def machine(monkeypatch):
    """Make the machine one with these GPUs, and the process one of those that torchrun starts."""

    def with_gpus(cuda: int = 0, mps: bool = False, local_rank: int = 0) -> list[int]:
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        return chosen

    return with_gpus


@pytest.mark.parametrize(
    ("gpus", "asked", "choices", "given"),
    [
        ({}, "auto", DEVICES, "cpu"),
        ({"mps": True}, "auto", DEVICES, "mps"),
        ({"mps": True}, "auto", QAT_DEVICES, "cpu"),
        ({"cuda": 1, "mps": True}, "auto", DEVICES, "cuda:0"),
        ({"cuda": 2, "local_rank": 1}, "cuda", DEVICES, "cuda:1"),
        ({"cuda": 2}, "cpu", DEVICES, "cpu"),
    ],
)
def test_the_device_is_what_is_asked_for_or_the_best_there_is(machine, gpus, asked, choices, given):
    chosen = machine(**gpus)
    args = Namespace(device=asked)
    device = choose_device(args, choices)
    assert device == torch.device(given)
    assert args.device == device.type
    assert chosen == ([device.index] if device.type == "cuda" else [])


@pytest.mark.parametrize(
    ("gpus", "args", "says"),
    [
        ({}, {"device": "cuda"}, "--device cuda is not available: use one of cpu, or auto"),
        ({"cuda": 1}, {"device": "mps"}, "--device mps is not available: use one of cuda, cpu, or auto"),
        ({"cuda": 2, "local_rank": 2}, {"device": "auto"}, "process 2 finds 2 GPUs"),
    ],
)
def test_a_device_that_is_not_there_is_refused(machine, monkeypatch, gpus, args, says):
    machine(**gpus)
    with pytest.raises(UserError, match=says):
        choose_device(Namespace(**args))


def test_amp_on_a_cpu_that_is_slow_in_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(build, "available", lambda: False)
    with pytest.raises(UserError, match="--amp on a CPU needs one that computes with bfloat16"):
        check_amp(torch.device("cpu"))
    check_amp(torch.device("cuda"))


def test_a_cpu_trains_in_bfloat16_where_that_is_fast(monkeypatch):
    monkeypatch.setattr("utils.training.precision.is_fast_in_bfloat16", lambda: True)
    check_amp(torch.device("cpu"))


def test_batches_go_where_the_model_is():
    batches = [(torch.ones(2, 3, 4, 4), torch.tensor([1, 2])), (torch.ones(1, 3, 4, 4), torch.tensor([0]))]
    # "meta" is a device that each machine has.
    moved = list(on_device(batches, device_of(nn.Linear(1, 1, device="meta"))))
    assert [(x.device.type, y.device.type, len(x), len(y)) for x, y in moved] == [
        ("meta", "meta", 2, 2),
        ("meta", "meta", 1, 1),
    ]
    for (images, labels), (same_images, same_labels) in zip(
        batches, on_device(batches, device_of(nn.ReLU())), strict=True
    ):
        assert images is same_images
        assert labels is same_labels


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_scripts_say_so_before_the_work_starts(run_script, tiny_weights, tiny_scripted, tmp_path):
    output = tmp_path / "w" / "m.pth"
    for argv, says in {
        ("train.py", "--device", "cuda", "--output", output): "--device cuda is not available",
        ("train.py", "--device", "tpu", "--output", output): "--device",
        ("quantization_aware_training.py", "--device", "cuda", "--output", output): "is not available",
        ("quantization_aware_training.py", "--device", "mps", "--output", output): "--device",
        ("evaluate.py", "--weights", tiny_weights, "--device", "cuda"): "--device cuda is not available",
        (
            *("evaluate.py", "--weights", tiny_scripted / "mobilenetv2_ptq_per_channel.pt"),
            *("--device", "cuda"),
        ): "is TorchScript, which is made for the CPU: leave --device cuda out",
    }.items():
        assert says in run_script(*argv, expect=2).stderr
    assert not output.exists()
