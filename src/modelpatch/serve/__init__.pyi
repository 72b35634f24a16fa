from .client import Client as Client
from .problems import Problem as Problem
from .settings import Settings as Settings
