"""A task as patch files describe it: name, kind, classes and metric."""

from typing import Self

from pydantic import BaseModel, Field, field_validator, model_validator

from modelpatch.errors import DataError
from modelpatch.tasks.classification import Classification
from modelpatch.tasks.kind import kind_of
from modelpatch.text import Facts, Text


class TaskRecord(BaseModel, frozen=True, extra="forbid"):
    """A task without its data. `classes` are in the order of the head's outputs; `metric` is, by default, that of the kind.

    `options` are what else the kind keeps in a patch, such as the thresholds of labels.
    """

    name: Text
    kind: Text = Classification.name
    classes: tuple[Text, ...] = Field(min_length=1)
    metric: Text = ""
    options: Facts = {}

    @model_validator(mode="after")
    def _fitting_metric(self) -> Self:
        try:
            kind = kind_of(self.kind)
        except DataError as error:
            raise ValueError(str(error)) from error
        metric = kind.metric
        kind.check_options(self.classes, self.options)
        if not self.metric:
            object.__setattr__(self, "metric", metric)
        elif self.metric != metric:
            raise ValueError(f"a {self.kind} task is measured by {metric}, not by {self.metric}")
        return self

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"two classes are named {twice!r}")
        return classes

    def __hash__(self) -> int:
        return hash(self.model_dump_json())
