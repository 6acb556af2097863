"""The paper's [B, T, ...] layout on top of SpikingJelly's [T, B, ...]."""

from torch import Tensor, nn

from gac.errors import InputError


class BatchFirst(nn.Module):
    """Give a network of the [T, B, ...] layout the paper's [B, T, ...] layout, by views alone.

    Sequences [B, T, C, H, W] in, logits [B, T, K] out; images [B, C, H, W] have no time and pass as they are.
    Raises InputError for a sequence of another length than the network's T.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        T = getattr(self.net, "T", None)
        if x.dim() == 5 and T not in (None, x.shape[1]):
            raise InputError(f"expected a sequence [B, T={T}, C, H, W], got {list(x.shape)}")
        return self.net(x.transpose(0, 1) if x.dim() == 5 else x).transpose(0, 1)
