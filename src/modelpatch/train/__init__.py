"""Training: the loop, its settings, the cache of frozen prefixes, metrics."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
