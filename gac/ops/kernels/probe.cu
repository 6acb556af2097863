// Shows that kernels compile, load and launch on a device.
__global__ void probe(float* answer) { *answer = 42.0f; }
