"""Time and memory bandwidth of each fused operation, beside SpikingJelly's neuron and torch's layers."""
