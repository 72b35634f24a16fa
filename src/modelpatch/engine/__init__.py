"""Many patches in one pass: the plan of what they share and the engine that runs it."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
