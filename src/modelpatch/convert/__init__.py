"""Conversions: patches out of checkpoints and of other patches, and ordinary models out of patches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
