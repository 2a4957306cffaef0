import multiprocessing
import os
import socket
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.ao.nn import quantized as int8

from models import MobileNetV2Quantization
from tests import script_process
from utils.common import distributed
from utils.deployment.torchscript_reader import read_torchscript
from utils.quantization import eager
from utils.quantization.eager import calibrate_qat, convert_qat, prepare_qat
from utils.training import parallel
from utils.training.kernels.layers import use_fast_layers


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(work, world_size: int = 2) -> list:
    """What `work(rank)` returns in each of `world_size` processes that torchrun could have started."""
    script_process.start_server()
    port, context = free_port(), multiprocessing.get_context("forkserver")
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_as_rank, args=(theirs, work, rank, world_size, port))
        process.start()
        ranks.append((process, ours))
    results = []
    for process, pipe in ranks:
        assert pipe.poll(120), "a process does not answer"
        results.append(pipe.recv())
        pipe.send("received")
        process.join()
        assert process.exitcode == 0
    return results


def _as_rank(pipe, work, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    distributed.start()
    pipe.send(work(rank))
    pipe.recv()  # the memory of a tensor is read from this process
    torch.distributed.destroy_process_group()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 2)
    )


def train_three_steps(_rank: int = 0, model: nn.Module | None = None) -> dict:
    model = (model or network()).train()
    called = parallel.parallelize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    images, labels = torch.randn(3, 8, 3, 8, 8) + 5, torch.randint(2, (3, 8))
    torch.manual_seed(2)
    for x, y in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(called(distributed.shard(x)), distributed.shard(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_two_processes_train_as_one_does():
    alone = train_three_steps()
    first, second = run_ranks(train_three_steps)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=2e-4, atol=2e-5)
        assert torch.equal(first[name], second[name]), name


def train_three_steps_with_kernels(_rank: int = 0) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
        *(nn.Flatten(), nn.Linear(216, 2)),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    use_fast_layers(model)
    return train_three_steps(model=model)


def test_two_processes_train_with_kernels_as_one_does():
    """Also where a row of the maps holds two pixels (24 channels)."""
    alone = train_three_steps_with_kernels()
    first, second = run_ranks(train_three_steps_with_kernels)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=2e-4, atol=2e-5)
        assert torch.equal(first[name], second[name]), name


def train_a_step_with_rounding(_rank: int = 0) -> dict:
    torch.manual_seed(0)
    model = MobileNetV2Quantization(3, 0.1, dropout=0.3, output_stride=8)
    # In a deep network that has learned nothing, what moves across the edge between two codes grows.
    model.features, model.classifier[1] = model.features[:4], nn.Linear(8, 3)
    images, labels = torch.randn(2, 16, 3, 16, 16), torch.randint(3, (2, 16))
    # The halves of a batch have ranges and statistics of their own.
    images[:, 8:] *= 3
    for _ in range(20):
        model(images[1])
    model = prepare_qat(model)
    calibrate_qat(model, [(images[1], labels[1])])
    called = parallel.parallelize(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(2)
    logits = called(distributed.shard(images[0]))
    nn.functional.cross_entropy(logits, distributed.shard(labels[0])).backward()
    optimizer.step()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    # The tensors of a model are taken by the names of a whole one, which this is not.
    with mock.patch.object(eager, "from_module") as from_module:
        convert_qat(model)
    (converted,) = from_module.call_args.args
    assert sum(isinstance(m, int8.Conv2d | int8.Linear) for m in converted.modules()) == 10
    return {name: value.clone() for name, value in (model.state_dict() | gradients).items()}


def test_two_processes_train_with_rounding_as_one_does():
    """Ranges, batch norms and dropout see the whole batch."""
    alone = train_a_step_with_rounding()
    first, second = run_ranks(train_a_step_with_rounding)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], value, rtol=1e-3, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_one_process_notices_nothing():
    model = network()
    assert parallel.parallelize(model) is model
    assert type(model[1]) is nn.BatchNorm2d
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    batch = torch.arange(5)
    assert distributed.shard(batch).tolist() == [0, 1, 2, 3, 4]
    assert distributed.gather("x") == ["x"]
    with distributed.main_first():
        pass


def collective(rank: int):
    with pytest.raises(distributed.UserError, match="multiple"):
        distributed.check_batch_size(5)
    total = distributed.all_reduce_sum(torch.tensor([rank + 1.0])).item()
    return distributed.gather(f"rank {rank}"), total, distributed.shard(torch.arange(5)).tolist()


def test_values_meet():
    assert run_ranks(collective) == [
        (["rank 0", "rank 1"], 3.0, [0, 1, 2]),
        (["rank 0", "rank 1"], 3.0, [3, 4]),
    ]


# Scripts over two processes, as torchrun starts them


class Ranks:
    """Two processes that run one script."""

    def __init__(self, folder: Path, *argv: object) -> None:
        self.errors = [folder / f"{rank}.err" for rank in (0, 1)]
        self.outputs = [folder / f"{rank}.out" for rank in (0, 1)]
        for path in (*self.errors, *self.outputs):
            path.touch()
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            script_process.start(
                list(map(str, argv)), str(out), str(err), shared | {"RANK": rank, "LOCAL_RANK": rank}
            )
            for rank, out, err in zip("01", self.outputs, self.errors, strict=True)
        ]

    def wait(self, rank: int) -> tuple[int | None, str, str]:
        """Exit code and what was printed."""
        self.processes[rank].join(120)
        return self.processes[rank].exitcode, self.outputs[rank].read_text(), self.errors[rank].read_text()


@pytest.fixture(scope="module")
def fast(tiny_folder, run_script):
    return ("--dataset", "folder", "--data_dir", tiny_folder, "--threads", 1, "--batch_size", 32)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_run_and_its_checkpoint_can_be_resumed(fast, tmp_path, run_script, lost):
    """With --scheduler none, a run that is told to end earlier goes through the same steps."""
    folder = tmp_path / "w"
    folder.mkdir()
    output, history = folder / "m.pth", folder / "m.history.csv"
    argv = ("train.py", *fast, "--width_mult", 0.1, "--output_stride", 32, "--output", output)
    argv += ("--scheduler", "none", "--lr", 0.01)
    ranks = Ranks(tmp_path, *argv, "--epochs", 999)
    deadline = time.monotonic() + 120
    while not (history.is_file() and len(history.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks.processes[lost].kill()
    code, _, complaint = ranks.wait(1 - lost)
    path = folder / "m.checkpoint.pth"
    assert code == 2
    assert complaint == (
        "error: another process of this run has ended: the same command with --resume goes on from the "
        f"checkpoint {path}\n"
    )
    assert not output.exists()
    checkpoint = torch.load(path, weights_only=True)
    epochs = len(checkpoint["progress"]["history"]) + 1
    assert epochs >= 2
    checkpoint["arguments"]["epochs"] = epochs
    del checkpoint["arguments"]["amp"]  # as if written before there was such a flag
    torch.save(checkpoint, path)
    printed = run_script(*argv, "--epochs", epochs, "--resume").stdout
    assert f" of {epochs}" in printed
    assert len(history.read_text().splitlines()) == 1 + epochs
    assert output.exists() and not path.exists()


def test_quantization_aware_training_over_two_processes_writes_one_file(fast, tiny_qmodel, tmp_path):
    output = tmp_path / "w" / "qat.pt"
    argv = ("quantization_aware_training.py", *fast, "--weights", tiny_qmodel, "--latency_rounds", 3)
    ranks = Ranks(tmp_path, *argv, "--epochs", 1, "--lr", 0.001, "--output", output)
    code, printed, complaints = ranks.wait(0)
    assert (code, complaints) == (0, "")
    assert ranks.wait(1) == (0, "", "")
    assert f"wrote {output}" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == ["qat.history.csv", "qat.pt"]
    _, metadata = read_torchscript(output)
    assert metadata.metrics["test_accuracy_pct"] > 90


def test_compiling_is_for_one_process(fast, tmp_path):
    ranks = Ranks(tmp_path, "train.py", *fast, "--compile", "--output", tmp_path / "m.pth")
    for rank in (0, 1):
        code, _, complaint = ranks.wait(rank)
        assert code == 2
        assert complaint.startswith("error: --compile is for a run of one process")
