import multiprocessing
import os
import socket

import pytest
import torch
from torch import nn

from utils import distributed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(work, world_size: int = 2) -> list:
    """What `work(rank)` returns in each of `world_size` processes that torchrun could have started."""
    port, context = free_port(), multiprocessing.get_context("spawn")
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


def train_three_steps(_rank: int = 0) -> dict:
    model = network().train()
    called = distributed.parallelize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    images, labels = torch.randn(3, 8, 3, 8, 8) + 5, torch.randint(2, (3, 8))
    torch.manual_seed(2)
    for x, y in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(called(distributed.share(x)), distributed.share(y))
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


def test_one_process_notices_nothing():
    model = network()
    assert distributed.parallelize(model) is model
    assert type(model[1]) is nn.BatchNorm2d
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    batch = torch.arange(5)
    assert distributed.share(batch).tolist() == [0, 1, 2, 3, 4]
    assert distributed.gather("x") == ["x"]
    with distributed.main_first():
        pass


def collective(rank: int):
    with pytest.raises(distributed.UserError, match="multiple"):
        distributed.check_batch_size(5)
    total = distributed.sum_over_processes(torch.tensor([rank + 1.0])).item()
    return distributed.gather(f"rank {rank}"), total, distributed.share(torch.arange(5)).tolist()


def test_values_meet():
    assert run_ranks(collective) == [
        (["rank 0", "rank 1"], 3.0, [0, 1, 2]),
        (["rank 0", "rank 1"], 3.0, [3, 4]),
    ]
