"""Selection of what to patch: profiles of blocks, greedy choice, search, active learning."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
