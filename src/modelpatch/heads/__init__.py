"""Heads: features, pooled features or maps to a task's output, one file a head."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
