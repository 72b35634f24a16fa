"""Sources of backbones, one file a source."""
