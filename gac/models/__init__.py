"""The networks and their registry."""

from gac.models.registry import create_model, describe, list_models, resolve_coding

__all__ = ["create_model", "describe", "list_models", "resolve_coding"]
