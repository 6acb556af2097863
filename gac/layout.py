"""The paper's [B, T, ...] layout on top of SpikingJelly's [T, B, ...]."""

from torch import Tensor, nn


class BatchFirst(nn.Module):
    """Give a network of the [T, B, ...] layout the paper's [B, T, ...] layout, by views alone.

    Sequences [B, T, C, H, W] in, logits [B, T, K] out; images [B, C, H, W] have no time and pass as they are.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(0, 1) if x.dim() == 5 else x).transpose(0, 1)
