from .joining import accuracy_by_task as accuracy_by_task
from .joining import join_tasks as join_tasks
from .splits import Split as Split
from .task import Task as Task
from .task import load_task as load_task
