"""Kinds of tasks: targets, loss, metrics and the meaning of an output, one file a kind."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
