"""Many patches in one pass: the plan of what they share and the engine that runs it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
