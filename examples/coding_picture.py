"""Draw how a trained network codes a digit: python examples/coding_picture.py runs/demo/best.pt coding.png."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softmax

import gac
from gac.data.digits import load_digits
from gac.data.normalization import Normalization


@torch.inference_mode()
def draw(checkpoint: str, picture: str) -> None:
    """Write ``picture``: for each time step the spikes, the gate, their product and the class probabilities so far."""
    digits = load_digits()
    images, labels = digits.splits["test"].images, digits.splits["test"].labels
    net = gac.load_checkpoint(checkpoint)
    network_input = Normalization(digits.mean, digits.std, images.device)(images)
    steps = torch.arange(1, net.T + 1)
    probabilities = softmax(net(network_input).cumsum(0) / steps[:, None, None], -1)  # [T, B, K]
    answers = probabilities.argmax(-1)
    # The first image that is wrong after one time step and right in the end; if there is none, the first of all.
    shown = int(((answers[0] != labels) & (answers[-1] == labels)).int().argmax())
    image, probabilities = images[shown, 0], probabilities[:, shown]
    features = net.stem(network_input[shown : shown + 1])  # [B, C, H, W]
    coded = net.coding(features)  # [T, B, C, H, W]
    spikes = (coded > 0).float()
    gate = torch.sigmoid(
        net.coding.gate.temporal(features)[:, :, None, None, None] * net.coding.gate.spatial_channel(features)
    )

    rows = {"spikes": spikes, "gate": gate, "spikes x gate": coded}
    figure, axes = plt.subplots(
        len(rows) + 1, net.T + 1, figsize=(1.45 * (net.T + 1), 6.2), layout="constrained", facecolor="white"
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axes[0, 0].imshow(image, cmap="gray")
    axes[0, 0].set_title("test image")
    for row, (name, tensor) in enumerate(rows.items()):
        maps = tensor[:, 0].mean(1)  # [T, H, W], the mean over channels
        for t in range(net.T):
            drawn = axes[row, t + 1].imshow(maps[t], cmap="magma", vmin=0, vmax=maps.max())
            axes[0, t + 1].set_title(f"t = {t + 1}")
        axes[row, 1].set_ylabel(name)
        figure.colorbar(drawn, ax=axes[row, :].tolist(), shrink=0.8)
    axes[-1, 1].set_ylabel("class probability")
    for t in range(net.T):
        axis = axes[-1, t + 1]
        axis.bar(range(len(probabilities[t])), probabilities[t], color="#55317f")
        axis.set_ylim(0, 1)
        axis.set_xticks(range(0, len(probabilities[t]), 3))
    figure.savefig(picture, dpi=120)
    print(f"wrote {Path(picture)}: test image {shown}, label {labels[shown]}, answers {answers[:, shown].tolist()}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/coding_picture.py CHECKPOINT PICTURE (a digits network with gated attention)")
    draw(*sys.argv[1:])
