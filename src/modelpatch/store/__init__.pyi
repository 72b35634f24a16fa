from .store import Problem as Problem
from .store import Store as Store
from .version import Version as Version
