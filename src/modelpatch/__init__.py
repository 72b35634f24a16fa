"""One frozen vision backbone, many tasks: each task is a small patch file instead of a copy of the model.

    import modelpatch as mp

    backbone = mp.load_backbone("bundled:tiny")
    task = mp.load_task("flowers/")
    patch = mp.fit(backbone, task, mp.methods.ScaleBias(), epochs=10)
    patch.save("flowers.safetensors")
    model = backbone.patched(mp.Patch.load("flowers.safetensors"))     # images -> logits

The command `modelpatch -h` does the same from a shell.
"""

from modelpatch.moved import attach
from modelpatch.version import __version__ as __version__

__getattr__, __dir__, __all__ = attach(__name__, __file__)
