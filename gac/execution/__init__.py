"""How anything runs: devices, processes, CUDA graphs, random state."""
