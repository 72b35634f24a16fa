"""Several tasks as one, over all their classes: joint patching, one patch and one head for the union.

    labels of task t    shifted by the number of classes of the tasks before it

Δ-Networks and PAINT both train joint patches for tasks that are known together, with images of an unknown task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelpatch.data.dataset_splits import join_splits
from modelpatch.data.splits import Split
from modelpatch.data.task import Task, check_classification
from modelpatch.errors import DataError
from modelpatch.tasks.classification import Evaluation
from modelpatch.tasks.record import TaskRecord


def join_tasks(tasks: Sequence[Task]) -> Task:
    """The images of several tasks as one task over all their classes, `TASK: CLASS` where two tasks share a name.

    It has validation images if all of them have. Raises `DataError` for no task, for one that is not of classification, for
    two of one name, and where only some have validation images.
    """
    if not tasks:
        raise DataError("there are no tasks to join. Expected at least one.")
    if len(tasks) == 1:
        return tasks[0]
    for task in tasks:
        check_classification(task, "A joint task")
    names = [task.task.name for task in tasks]
    if len(set(names)) < len(names):
        raise DataError(
            f"tasks that are joined need names of their own; these are {', '.join(names)}. Rename a folder."
        )
    lacking = [name for name, task in zip(names, tasks, strict=True) if task.validation is None]
    if 0 < len(lacking) < len(tasks):
        raise DataError(
            f"only some of the tasks have validation images; {', '.join(lacking)} has none. Use `with_validation` on it."
        )
    starts = np.cumsum([0, *(len(task.classes) for task in tasks[:-1])])

    def together(parts: Sequence[Split]) -> Split:
        return join_splits(
            parts, np.concatenate([part.labels + start for part, start in zip(parts, starts, strict=True)])
        )

    return Task(
        joint_task([task.task for task in tasks]),
        together([task.train for task in tasks]),
        together([task.test for task in tasks]),
        None if lacking else together([task.validation for task in tasks if task.validation is not None]),
        {"joined": {task.task.name: len(task.classes) for task in tasks}},
    )


def joint_task(tasks: Sequence[TaskRecord]) -> TaskRecord:
    """One task with the classes of several."""
    if len(tasks) == 1:
        return tasks[0]
    names = [name for task in tasks for name in task.classes]
    classes = [f"{task.name}: {name}" if names.count(name) > 1 else name for task in tasks for name in task.classes]
    return TaskRecord(name="+".join(task.name for task in tasks)[:256], classes=tuple(classes))


def accuracy_by_task(evaluation: Evaluation, data: Task) -> dict[str, float]:
    """Top-1 in [0, 1] on the images of every joined task, which all compete for all classes; empty for a single task."""
    confusion, accuracies, start = np.asarray(evaluation.confusion), {}, 0
    for name, count in data.facts.get("joined", {}).items():
        rows = slice(start, start + count)
        accuracies[name] = float(np.trace(confusion[rows, rows]) / confusion[rows].sum())
        start += count
    return accuracies
