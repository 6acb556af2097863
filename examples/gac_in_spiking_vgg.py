"""Gated attention coding in SpikingJelly's spiking VGG-11, on digits: python examples/gac_in_spiking_vgg.py [STEPS].

Trains the host as it is and with the coding on 8 images, and prints the losses and the operations of an image.
"""

import sys

import torch
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.model.spiking_vgg import spiking_vgg11_bn
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.swa_utils import update_bn

from gac import replace_input_neuron
from gac.analysis.energy import measure_energy
from gac.data.digits import load_digits

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
digits = load_digits().splits["train"]
images = interpolate(digits.images[:8] / 255, size=32).expand(4, -1, 3, -1, -1)  # [T, B, C, H, W]
for name in ("as it is", "with GAC"):
    torch.manual_seed(0)
    net = spiking_vgg11_bn(spiking_neuron=neuron.LIFNode)
    net.avgpool, net.classifier = layer.AdaptiveAvgPool2d(1), layer.Linear(512, 10)  # ImageNet's has 124 M weights
    functional.set_step_mode(net, "m")
    if name == "with GAC":
        replace_input_neuron(net, images[:, :1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(net(images).mean(0), digits.labels[:8])
        print(f"{name}, step {step}: loss {loss.item():.4f}")
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
    update_bn([images], net)  # so few steps leave BatchNorm's running statistics far behind the weights
    energy = measure_energy(net, [images])
    print(f"{name}: {energy.macs / 8e6:.2f} M MAC and {energy.synops / 8e6:.2f} M SynOp an image")
