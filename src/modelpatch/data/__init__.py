"""Data of tasks: sources, decoding, augmentation and targets."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
