"""The papers' tables as recipes that run at a small scale or at the papers' own, with their claims checked."""

from modelpatch_studies.bench import Bench
from modelpatch_studies.data import Sources
from modelpatch_studies.outcome import Outcome, Verdict
from modelpatch_studies.recipe import Claim, Part, Recipe, Scale
from modelpatch_studies.registry import PAPERS, RECIPES, choose

__all__ = ["PAPERS", "RECIPES", "Bench", "Claim", "Outcome", "Part", "Recipe", "Scale", "Sources", "Verdict", "choose"]
