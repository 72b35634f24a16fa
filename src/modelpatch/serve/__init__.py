"""Patches as a service: an HTTP server over a store and an engine, its page, and its client."""

from modelpatch.serve.client import Client
from modelpatch.serve.problems import Problem
from modelpatch.serve.settings import Settings

__all__ = ["Client", "Problem", "Settings"]
