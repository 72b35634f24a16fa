"""The version of the package, which patches and run files name."""

__version__ = "0.1.0"
