"""Throughput of training and evaluation over time steps, batch, precision and implementation."""
