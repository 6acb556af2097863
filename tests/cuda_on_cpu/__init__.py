"""Runs the CUDA kernels on the CPU: the same source, compiled by g++ behind ``cuda_on_cpu.h``."""
