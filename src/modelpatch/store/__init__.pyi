from .store import Fault as Fault
from .store import Store as Store
from .version import Version as Version
