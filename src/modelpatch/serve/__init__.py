"""Patches over HTTP: the server, its page and its client."""

from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
