"""Compiles and launches CUDA kernels through CuPy."""
