"""What to patch: profiles of blocks, greedy selection, active learning, and patches that keep a budget."""

from modelpatch.select.budget import Budget
from modelpatch.select.greedy import Greedy, Selection, select
from modelpatch.select.latency import added_latency
from modelpatch.select.profile import Profile, profile

__all__ = ["Budget", "Greedy", "Profile", "Selection", "added_latency", "profile", "select"]
