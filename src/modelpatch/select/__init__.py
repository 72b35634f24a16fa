"""What to patch: profiles of blocks, greedy selection, active learning, and patches that keep a budget."""

from modelpatch.select.active import Curves, Pick, pick, simulate
from modelpatch.select.budget import Budget
from modelpatch.select.greedy import Greedy, Selection, select
from modelpatch.select.latency import added_latency
from modelpatch.select.profile import Profile, profile
from modelpatch.select.search import Search, search

__all__ = [
    "Budget",
    "Curves",
    "Greedy",
    "Pick",
    "Profile",
    "Search",
    "Selection",
    "added_latency",
    "pick",
    "profile",
    "search",
    "select",
    "simulate",
]
