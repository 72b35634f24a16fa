"""What a patch answers: the kind of question and the names of its answers.

| kind             | answer for an image                                                                            | metric |
|------------------|------------------------------------------------------------------------------------------------|--------|
| `classification` | logits (K,)                                                                                    | `top1` |
| `segmentation`   | logits (K, H, W), a class for every pixel                                                      | `miou` |
| `detection`      | boxes (N, 6): x0, y0, x1, y1 in pixels, score, class; rows of score 0 are no boxes             | `map`  |
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modelpatch.text import Text

Kind = Literal["classification", "segmentation", "detection"]
Metric = Literal["top1", "miou", "map"]
METRICS: dict[str, Metric] = {"classification": "top1", "segmentation": "miou", "detection": "map"}


class TaskRecord(BaseModel):
    """A task without its data. `classes` are in the order of the head's outputs; `metric` is that of the kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    kind: Kind = "classification"
    classes: tuple[Text, ...] = Field(min_length=1)
    metric: Metric = "top1"

    @model_validator(mode="after")
    def _fitting_metric(self) -> TaskRecord:
        if self.metric != METRICS[self.kind]:
            raise ValueError(f"a {self.kind} task is measured by {METRICS[self.kind]}, not by {self.metric}")
        return self

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"two classes are named {twice!r}")
        return classes
