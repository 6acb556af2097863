"""Measurements that can be repeated: run a module of this package from the project's root."""
