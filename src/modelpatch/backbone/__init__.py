"""The frozen network: load it, cut it into a chain, clone its structure, prove that it did not change."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
