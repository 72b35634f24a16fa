"""Conversions: patches out of checkpoints and of other patches, and ordinary models out of patches."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
