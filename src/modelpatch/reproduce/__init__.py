"""The papers' tables as recipes that run at a small scale or at the papers' own, with their claims checked."""

from modelpatch.reproduce.bench import Bench
from modelpatch.reproduce.data import Sources
from modelpatch.reproduce.outcome import Outcome, Verdict
from modelpatch.reproduce.recipe import Claim, Part, Recipe, Scale
from modelpatch.reproduce.registry import PAPERS, RECIPES, choose

__all__ = ["PAPERS", "RECIPES", "Bench", "Claim", "Outcome", "Part", "Recipe", "Scale", "Sources", "Verdict", "choose"]
