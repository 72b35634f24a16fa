from .evaluation import evaluate as evaluate
from .evaluation import harmonic_mean as harmonic_mean
from .evaluation import store_as as store_as
from .fitting import fit as fit
from .settings import FitSettings as FitSettings
