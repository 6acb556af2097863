"""How an image becomes spikes."""

from typing import Literal

Coding = Literal["gac", "direct", "rate", "latency", "phase"]
