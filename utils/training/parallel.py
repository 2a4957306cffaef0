"""Training one model in several processes: gradients, batch norm and dropout of the whole batch."""

import warnings

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from utils.common import distributed
from utils.training.recast import recast


def parallelize(model: nn.Module) -> nn.Module:
    """Return what to call instead of `model` in training; its gradients are averaged over all processes."""
    if distributed.world_size() == 1:
        return model
    synchronized = {nn.BatchNorm2d: SynchronizedBatchNorm2d, nn.Dropout: SynchronizedDropout}
    recast(model, lambda layer, _before: synchronized.get(type(layer)))
    # Both memory formats of a 1x1 filter are the same bytes; only the strides differ.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(model)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: FunctionCtx, x: Tensor) -> Tensor:
        return distributed.all_reduce_sum(x.clone())

    @staticmethod
    def backward(_ctx: FunctionCtx, grad_output: Tensor) -> Tensor:
        # Every process's loss depends on every process's input.
        return distributed.all_reduce_sum(grad_output.clone())


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batch of all processes; torch's own SyncBatchNorm needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W) by the statistics of all processes' N * H * W values."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        # The variance within processes plus that of their means; a difference of squares could be negative.
        x = x.float()  # with --amp it comes in bfloat16
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        moments = x.new_zeros(distributed.world_size(), 2, x.shape[1])
        moments[distributed.rank()] = torch.stack([mean, variance])
        means, variances = _AllReduceSum.apply(moments).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), x.numel() // x.shape[1] * distributed.world_size())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (x - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        tracked, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        assert tracked is not None and running_mean is not None and running_var is not None
        assert self.momentum is not None
        tracked.add_(1)
        running_mean.lerp_(mean, self.momentum)
        running_var.lerp_(variance * (count / (count - 1)), self.momentum)


class SynchronizedDropout(nn.Dropout):
    """Dropout that draws the mask of the whole batch and applies this process's shard of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of (N, C), each with probability `p`."""
        if not self.training or self.p == 0:
            return x
        keep = torch.empty(distributed.world_size() * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)
        return x * (distributed.shard(keep.bernoulli_(1 - self.p)) / (1 - self.p))
