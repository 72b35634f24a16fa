"""The papers' tables as recipes that run at a small scale or at the papers' own, with their claims checked."""

from modelpatch_studies.bench import Workbench
from modelpatch_studies.data import Sources
from modelpatch_studies.recipe import Claim, Job, Recipe, Scale
from modelpatch_studies.registry import PAPERS, RECIPES, choose
from modelpatch_studies.results import Results, Verdict

__all__ = [
    "PAPERS",
    "RECIPES",
    "Claim",
    "Job",
    "Recipe",
    "Results",
    "Scale",
    "Sources",
    "Verdict",
    "Workbench",
    "choose",
]
