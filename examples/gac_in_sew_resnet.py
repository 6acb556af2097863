"""Gated attention coding in SpikingJelly's SEW-ResNet-18, on digits: python examples/gac_in_sew_resnet.py [STEPS].

Trains the host as it is and with the coding on 16 images, and prints the losses and the operations of an image.
"""

import sys

import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model.sew_resnet import sew_resnet18
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.swa_utils import update_bn

from gac import replace_input_neuron
from gac.analysis.energy import measure_energy
from gac.data.digits import load_digits

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
digits = load_digits().splits["train"]
images = interpolate(digits.images[:16] / 255, size=32).expand(4, -1, 3, -1, -1)  # [T, B, C, H, W]
for name in ("as it is", "with GAC"):
    torch.manual_seed(0)
    net = sew_resnet18(num_classes=10, cnf="ADD", spiking_neuron=neuron.LIFNode)
    functional.set_step_mode(net, "m")
    if name == "with GAC":
        replace_input_neuron(net, images[:, :1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(net(images).mean(0), digits.labels[:16])
        print(f"{name}, step {step}: loss {loss.item():.4f}")
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
    update_bn([images], net)  # so few steps leave BatchNorm's running statistics far behind the weights
    energy = measure_energy(net, [images])
    print(f"{name}: {energy.macs / 16e6:.2f} M MAC and {energy.synops / 16e6:.2f} M SynOp an image")
