"""What a patch answers: the kind of question and the names of its answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from modelpatch.patch.text import Text


class Task(BaseModel):
    """A task without its data. `classes` are in the order of the head's outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    kind: Literal["classification"] = "classification"
    classes: tuple[Text, ...] = Field(min_length=1)
    metric: Literal["top1"] = "top1"
