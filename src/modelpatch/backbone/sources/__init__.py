"""Sources of backbones, one file a source; `base.py` has their interface and registry."""
