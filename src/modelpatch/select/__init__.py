"""Selection of what to patch: profiles of blocks, greedy choice, search, active learning."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
