import pytest
import torch
from torch import nn

from utils.common.errors import UserError
from utils.training.compilation import check_compiler, compiled

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )


def test_a_compiled_model_trains_as_the_plain_one_does_at_each_stride():
    """Weights, statistics and gradients are the plain model's own; a change of stride is followed."""
    model, plain = network(), network()
    called = compiled(model)
    for step, stride in enumerate((2, 1)):
        images = torch.randn(16, 3, 8, 8)
        for one, used in ((model, called), (plain, plain)):
            one[0].stride = (stride, stride)
            one.zero_grad()
            used.train()
            torch.manual_seed(step)
            nn.functional.cross_entropy(used(images), torch.arange(16) % 3).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert model.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_compiler_there_is_one_line(monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    with pytest.raises(UserError, match=r"^--compile needs a C\+\+ compiler that works") as refused:
        check_compiler(CPU)
    assert len(str(refused.value).splitlines()) == 1
