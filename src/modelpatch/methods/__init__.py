"""Methods of making patches, one file a method, each with its paper and formula at the top."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
