"""Where the time of a training or evaluation step goes."""
