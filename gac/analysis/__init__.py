"""What a network does inside: energy, firing rates and gates."""
