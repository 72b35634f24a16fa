"""Backends that compile runs of an engine's modules, one a file, by name in `modelpatch.engine.backends.base.BACKENDS`."""
