"""Versions of patches by name and tag, in a folder or an object store."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
