"""Let NeuroBench measure a trained network, its numbers beside ours: python examples/neurobench_eval.py [CHECKPOINT].

CHECKPOINT is of a network of digits, by default the one in this package. NeuroBench 2.3 brings tonic, which is GPL-3.0;
so it is no dependency of this package: install it yourself (pip install neurobench).
"""

import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import gac
from gac.analysis.energy import measure_energy
from gac.analysis.firing import measure_firing
from gac.data.digits import load_digits
from gac.data.normalization import Normalization

try:
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics.static import Footprint, ParameterCount
    from neurobench.metrics.workload import ActivationSparsity, ClassificationAccuracy, SynapticOperations
    from neurobench.models import TorchModel
except ImportError as error:
    sys.exit(f"{error}: this example needs NeuroBench: pip install neurobench (it brings tonic, which is GPL-3.0)")


class Classifier(TorchModel):
    """NeuroBench's view of the network, which stays as it is: classes [B], and every layer of spiking neurons."""

    def __call__(self, batch):
        return self.net(batch).mean(0).argmax(-1)

    def activation_layers(self):
        # NeuroBench's own walk names a layer by the last part of its name, which several share.
        layers = self.net.named_modules()
        return [{"layer_name": name, "layer": layer} for name, layer in layers if isinstance(layer, gac.LIFNode)]


@torch.no_grad()
def main(checkpoint: str | None = None) -> None:
    """Print a table: what NeuroBench and this package say of the network on all test images."""
    net = gac.load_pretrained("digits").network if checkpoint is None else gac.load_checkpoint(checkpoint)
    digits = load_digits()
    images, labels = digits.splits["test"].images, digits.splits["test"].labels
    images = Normalization(digits.mean, digits.std, "cpu")(images)
    # All images in one batch: NeuroBench's accuracy is the mean over batches, whatever their sizes.
    loader = DataLoader(TensorDataset(images, labels), batch_size=len(labels))
    workload = [ClassificationAccuracy, ActivationSparsity, SynapticOperations]
    theirs = Benchmark(Classifier(net), loader, [], [], [[Footprint, ParameterCount], workload]).run(quiet=True)
    energy, firing = measure_energy(net, [images]), measure_firing(net, [images])
    neurons = sum(layer.spikes.numel() * layer.neurons for layer in firing)
    spikes = sum(int(layer.spikes.sum()) for layer in firing)
    right = (net(images).mean(0).argmax(-1) == labels).float().mean().item()
    operations = theirs["SynapticOperations"]
    rows = {
        "top-1": (theirs["ClassificationAccuracy"], right),
        "parameters": (theirs["ParameterCount"], sum(each.numel() for each in net.parameters())),
        "activation sparsity": (theirs["ActivationSparsity"], 1 - spikes / neurons),
        "accumulates an image": (float(operations["Effective_ACs"]), energy.synops / energy.images),
        "multiply-accumulates an image": (float(operations["Effective_MACs"]), energy.macs / energy.images),
    }
    print(f"{'':30}{'NeuroBench':>14}{'gac':>14}")
    for name, values in rows.items():
        print(f"{name:30}" + "".join(f"{value:14,.4f}" if value < 1 else f"{value:14,.1f}" for value in values))


if __name__ == "__main__":
    main(*sys.argv[1:2])
