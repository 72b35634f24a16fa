"""The frozen network: load it, cut it into a chain, clone its structure, prove that it did not change."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
