"""Patches: tensors over a frozen backbone, a head and a task, in one file that cannot be silently damaged."""

import modelpatch.patch.model  # noqa: F401  (registers what `Backbone.patched` builds)
from modelpatch.moved import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
