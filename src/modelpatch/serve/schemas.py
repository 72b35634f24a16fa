"""The bodies of requests and answers, with examples, as OpenAPI shows them."""

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints
from pydantic.config import JsonDict

from modelpatch.store.version import NAME, Name

REFERENCE = rf"^{NAME.pattern}(@{NAME.pattern})?$"
MOST_TOP = 1000
Reference = Annotated[str, StringConstraints(pattern=REFERENCE)]
Share = Annotated[float, Field(ge=0, le=1)]
Color = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$", description="In pictures of the answer.")]
Rectangle = Annotated[list[float], Field(min_length=4, max_length=4)]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
HASH = "9f2c" + "0" * 60
ROSE: JsonDict = {"class": "rose", "index": 7, "probability": 0.93}


EXAMPLE: JsonDict = {"images": [PIXEL], "tasks": ["base"], "top": 3}
ANSWER: JsonDict = {"images": [{"answers": {"flowers": {"version": HASH, "top": [ROSE]}}}], "refused": {}}


class PredictRequest(BaseModel, extra="forbid", json_schema_extra={"examples": [EXAMPLE]}):
    """Images and what to ask about them."""

    images: list[str] = Field(min_length=1, description="Image files in base64: JPEG, PNG, WebP, GIF, BMP or PPM.")
    tasks: list[Reference] | None = Field(
        None, description="Patches for every image: NAME, NAME@TAG or NAME@HASH; base is the backbone. All without it."
    )
    per_image: list[Reference] | None = Field(None, description="Instead of tasks: one for every image.")
    top: int = Field(3, ge=1, le=MOST_TOP, description="Classes an answer, the likeliest first.")


class ClassAnswer(BaseModel):
    """A class by its name and its number."""

    class_: str = Field(alias="class")
    index: int


class Guess(ClassAnswer):
    """A class and its probability."""

    probability: Share


class AreaAnswer(ClassAnswer):
    """A class and the share of what the network saw that it covers."""

    color: Color
    share: Share


class Overlay(BaseModel):
    """A half-transparent PNG in base64, and where it belongs: left, top, width and height in shares of the image's sides."""

    png: str
    place: Rectangle


class BoxAnswer(Guess):
    """An object: left, top, right and bottom in the image's own pixels."""

    color: Color
    box: Rectangle


class LabelAnswer(Guess):
    """A label that the image has: its probability is not below the `threshold` that the patch keeps for it."""

    threshold: Share


class NumberAnswer(BaseModel):
    """A number by its name and place, in the unit of the training data."""

    name: str
    index: int
    value: float


class TaskAnswer(BaseModel):
    """The answer of one task for one image. `version` is the SHA-256 of the patch file, of the base its fingerprint.

    A segmentation has `areas`, the largest first, and an `overlay` instead of guesses; a detection `boxes` from a probability
    of 0.5 on, the surest first, and the image's width and height. A task of several labels an image has `labels` beside its
    guesses, a regression `values` instead of them.
    """

    version: str
    top: list[Guess]
    areas: list[AreaAnswer] | None = None
    overlay: Overlay | None = None
    boxes: list[BoxAnswer] | None = None
    size: list[int] | None = None
    labels: list[LabelAnswer] | None = None
    values: list[NumberAnswer] | None = None


class ProblemBody(BaseModel, extra="allow"):
    """An error (RFC 9457): what happened, and what to do."""

    type: str
    title: str
    status: int
    detail: str
    advice: str | None = None
    instance: str | None = None
    patch: str | None = None
    image: int | None = None


class ImageAnswers(BaseModel):
    """The answers for one image, by the names that were asked for."""

    answers: dict[str, TaskAnswer]


class Prediction(BaseModel, json_schema_extra={"examples": [ANSWER]}):
    """Answers in the order of the images. `refused` names tasks that could not be answered, and why."""

    images: list[ImageAnswers]
    refused: dict[str, ProblemBody]


class PatchInfo(BaseModel):
    """A version of a patch. `fits` is True if it belongs to this server's backbone, `problem` is its last failure to load.

    `signers` are those that the signature claims: by name where this server requires them, else ids of keys. `trusted` is True
    if it requires one of them, whose signature it checks before it loads the patch; null if it requires nobody's.
    """

    name: str
    version: str
    tags: list[str]
    nbytes: int
    created: str
    method: str
    task: str
    metrics: dict[str, float]
    signers: list[str]
    trusted: bool | None
    resident: bool
    fits: bool
    problem: ProblemBody | None


class BackboneInfo(BaseModel):
    """The frozen network that all patches share."""

    spec: str
    fingerprint: str
    parameters: int
    classes: int


class PatchList(BaseModel):
    """Patches in the order of names; `next` continues the list as `after`."""

    patches: list[PatchInfo]
    next: str | None
    backbone: BackboneInfo


class VersionList(BaseModel):
    """All versions of a patch."""

    name: str
    versions: list[PatchInfo]


class TagRequest(BaseModel, extra="forbid", json_schema_extra={"examples": [{"tag": "prod", "version": "latest"}]}):
    """The version that the tag shall name: the beginning of its hash, or another tag."""

    tag: Name
    version: Name = "latest"


class PlanNode(BaseModel):
    """A stretch of modules: images and operations through it, whether a patch owns it, and the tasks answered after it."""

    name: str
    images: int
    flops: int
    own: bool
    tasks: list[str]
    children: list["PlanNode"]


class PlanAnswer(BaseModel):
    """The work that tasks share: `shared` is the part of the separate operations that running them together saves.

    `refused` names tasks that could not be loaded, and why.
    """

    backbone: BackboneInfo
    tasks: list[str]
    images: int
    flops: int
    separate_flops: int
    shared: float
    bytes: int
    memory: dict[str, int]
    tree: list[PlanNode]
    refused: dict[str, ProblemBody]


class Health(BaseModel):
    """The state of the server."""

    status: str
