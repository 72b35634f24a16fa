from .sources.base import DataSource as DataSource
from .sources.base import Found as Found
from .sources.base import register_source as register_source
from .splits import Split as Split
from .task import Task as Task
from .task import accuracy_by_task as accuracy_by_task
from .task import join_tasks as join_tasks
from .task import load_task as load_task
