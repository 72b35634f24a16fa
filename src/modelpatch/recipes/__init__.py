"""Recipes of several fits: comparisons, PAINT, multi-task training, several resolutions, cascades."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
