"""How patches run together: a plan of what they share, and the engine that runs it."""

from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.describe import describe_step
from modelpatch.engine.engine import Engine
from modelpatch.engine.measure import measure
from modelpatch.engine.plan import Plan, make_plan
from modelpatch.engine.program import Timing
from modelpatch.engine.rounds import Routed
from modelpatch.engine.stream import Answers

__all__ = ["Answers", "Engine", "Plan", "Routed", "Timing", "Tuning", "describe_step", "make_plan", "measure"]
