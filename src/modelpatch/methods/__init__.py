"""Methods of making patches, one file a method, each with its paper and formula at the top."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
