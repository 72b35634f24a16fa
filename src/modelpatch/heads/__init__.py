"""Heads: features, pooled features or maps to a task's output, one file a head."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
