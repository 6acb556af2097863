"""BatchNorm of the networks: over batch and time jointly, for static frames, over several ranks, for fused kernels."""

from collections.abc import Sequence

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
        tracked = self.track_running_stats and self.running_mean is not None
        if not self.training or (not self.synchronized and (repeats == 1 or not tracked)):
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
        if tracked:
            self._move_running_statistics(mean, unbiased)
        return y

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1.0 / float(self.num_batches_tracked)
        # As torch where there is neither a momentum nor a number of batches.
        share = share or 0.0
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased_variance, share)

    @torch.no_grad()
    def normalization(self, y: Tensor, inverse_std: Tensor | None) -> BatchNormTransform:
        """Return what this module does to ``y`` [T, B, C, H, W] for a fused operation to apply.

        In training the statistics are those of ``y``, and the running statistics are updated. In evaluation
        ``inverse_std`` [C] is what :func:`running_inverse_stds` returned for this module. Raises ValueError for a
        single value per channel in training, as the parent does.
        """
        weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
        if not self.training:
            return BatchNormTransform(weight, bias, running_mean, inverse_std, from_batch=False)
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


@torch.no_grad()
def running_inverse_stds(norms: Sequence[BatchNorm2d]) -> list[Tensor | None]:
    """Return the running inverse standard deviation [C] of each module in evaluation mode, None for others.

    Two launches for all of them, where each by itself would need two.
    """
    used = [norm for norm in norms if not norm.training]
    if not used:
        return [None] * len(norms)
    found = torch._foreach_add([norm.running_var for norm in used], [norm.eps for norm in used])
    torch._foreach_rsqrt_(found)
    remaining = iter(found)
    return [None if norm.training else next(remaining) for norm in norms]
