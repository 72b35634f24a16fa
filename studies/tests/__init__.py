"""Tests of the studies. A package, so that its conftest.py and that of the repository's tests/ can stand side by side."""
