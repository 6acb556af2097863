"""How an image becomes spikes."""
