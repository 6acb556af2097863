"""Fused operations: one file each, with the readable reference, the autograd and the public function."""
