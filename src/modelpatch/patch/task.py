"""What a patch answers: the kind of question and the names of its answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from modelpatch.text import Text


class Task(BaseModel):
    """A task without its data. `classes` are in the order of the head's outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    kind: Literal["classification"] = "classification"
    classes: tuple[Text, ...] = Field(min_length=1)
    metric: Literal["top1"] = "top1"

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"two classes are named {twice!r}")
        return classes
