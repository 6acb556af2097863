"""BatchNorm of the networks: over batch and time jointly, for static frames, over several ranks, for fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac.ops import batch_norm
from gac.ops.batch_norm import BatchNormTransform


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that takes one frame for T equal ones if asked, and its statistics over all ranks if asked.

    Mean and variance of T equal frames are those of one; only the factor n / (n - 1) of the running variance
    differs, and ``repeats=T`` gives it the n of T frames. Input and output [B, C, H, W].

    With ``synchronized`` (an attribute, False by default) a training batch is that of all ranks of torch.distributed's
    default process group: outputs, gradients and running statistics are those of one process with the whole batch.
    torch's SyncBatchNorm has neither static frames nor a CPU version.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.synchronized = False

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        if not self.training or (repeats == 1 and not self.synchronized):
            return super().forward(x)
        n = x.numel() // x.shape[1]
        if self.synchronized:
            moments = batch_norm.over_all_ranks(batch_norm.reference_moments(x), n * repeats)
            mean, variance, unbiased = moments
            normalization = BatchNormTransform(self.weight, self.bias, mean, (variance + self.eps).rsqrt(), True)
            y = batch_norm.reference(x, normalization).to(x.dtype)
        else:
            mean, unbiased = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            y = F.batch_norm(x, mean, unbiased, self.weight, self.bias, True, 1.0, self.eps)
            unbiased = unbiased * ((n - 1) * repeats / (n * repeats - 1))
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        return y

    @torch.no_grad()
    def normalization(self, y: Tensor) -> BatchNormTransform:
        """Return what this module does to ``y`` [T, B, C, H, W] for a fused operation to apply, on a CUDA device.

        In training the statistics are those of ``y``, and the running statistics are updated. Raises ValueError for a
        single value per channel in training, as the parent does.
        """
        weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
        if not self.training:
            return BatchNormTransform(weight, bias, running_mean, (running_var + self.eps).rsqrt(), from_batch=False)
        count = y.numel() // y.shape[2]
        if count < 2 and not self.synchronized:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
        running = (self.eps, self.momentum, running_mean, running_var, self.num_batches_tracked)
        if self.synchronized:
            moments = batch_norm.over_all_ranks(batch_norm.batch_moments(y), count)
            mean, inverse_std = batch_norm.reference_statistics(moments, *running)
        else:
            mean, inverse_std = batch_norm.batch_statistics(y, *running)
        return BatchNormTransform(weight, bias, mean, inverse_std, True, self.synchronized)
