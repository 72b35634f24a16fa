"""Heads of every kind through the registry, and one of another distribution."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from conftest import forgetting
from modelpatch.backbone.backbone import Backbone
from modelpatch.engine.resident import BoundPatch
from modelpatch.errors import ForeignTensorError, InvalidPatchError
from modelpatch.heads.base import HEADS, Decoder, Head, HeadRecord, register_head
from modelpatch.heads.detector import Detector
from modelpatch.heads.reading import Read
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.patch.blueprint import Blueprint
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.patch.model import PatchedModel
from tolerance import close

MAPS = {"taps": (1, 3), "widths": (8, 16), "strides": (4, 8), "features": 24}
RECORDS = [
    HeadRecord(features=16, outputs=3),
    HeadRecord(kind="cosine", features=16, outputs=3),
    HeadRecord(kind="siamese", features=32, outputs=3),
    HeadRecord(kind="selected", features=4, outputs=3, taps=(1, 3)),
    HeadRecord(kind="fcn", outputs=3, **MAPS),
    HeadRecord(kind="deeplab", outputs=3, hidden=8, **MAPS),
    HeadRecord(kind="faster-rcnn", outputs=3, hidden=8, **MAPS),
    HeadRecord(kind="ssdlite", outputs=3, hidden=8, **MAPS),
]


@pytest.fixture
def average() -> Iterator[type[Head]]:
    """A head of somebody else's: a linear layer on pooled inner outputs, with an option of its own."""

    with forgetting(HEADS):

        @register_head("average")
        class AverageHead(Head):
            takes = frozenset({"taps", "options"})

            def __init__(self, record: HeadRecord) -> None:
                super().__init__()
                self._record = record
                self.linear = nn.Linear(record.features, record.outputs)

            @property
            def record(self) -> HeadRecord:
                return self._record

            @classmethod
            def build(cls, record: HeadRecord) -> AverageHead:
                return cls(record)

            @classmethod
            def list_reads(cls, record: HeadRecord) -> tuple[Read, ...]:
                return tuple(Read(tap, "pooled") for tap in record.taps)

            def forward(self, features: Tensor) -> Tensor:
                return self.linear(features) * self.record.options.get("scale", 1)

        yield AverageHead


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_a_record_builds_its_head_and_the_head_gives_the_record(record: HeadRecord) -> None:
    head = record.build()
    assert head.record == record
    assert head.kind == record.kind
    assert {f"head.{name}": tensor.shape for name, tensor in head.stored().items()} == record.shapes()
    assert isinstance(head, Decoder) == all(read.form == "map" for read in head.reads)
    if isinstance(head, Decoder):
        maps = tuple(torch.randn(2, width, 32 // stride, 32 // stride) for width, stride in ((8, 4), (16, 8)))
        with torch.no_grad():
            answers = head.eval()(maps)
        assert answers.shape == ((2, 100, 6) if isinstance(head, Detector) else (2, 3, 32, 32))


def test_every_kind_has_a_record_here() -> None:
    assert set(HEADS.names()) == {record.kind for record in RECORDS}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "linnear"}, r"no head 'linnear'. Did you mean 'linear'\? Known: cosine, deeplab"),
        ({"kind": "linear", "taps": (1,)}, "linear head has no taps"),
        ({"kind": "linear", "options": {"scale": 2}}, "linear head has no options"),
        ({"kind": "cosine", "hidden": 3}, "has no hidden"),
        ({"kind": "selected"}, "needs taps"),
        ({"kind": "selected", "taps": (2, 1)}, "in their order"),
        ({"kind": "fcn", "taps": (1,)}, "needs widths"),
        ({"kind": "fcn", "taps": (1,), "widths": (3, 1), "strides": (4,)}, "expected one of each"),
        ({"kind": "fcn", "taps": (1,), "widths": (3,), "strides": (4,)}, "are not 4 features"),
        ({"kind": "deeplab", "taps": (1,), "widths": (4,), "strides": (4,)}, "needs hidden"),
    ],
)
def test_records_that_make_no_sense_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        HeadRecord(features=4, outputs=2, **fields)  # type: ignore[arg-type]


def test_a_head_of_another_distribution_is_trained_stored_and_served(tiny: Backbone, average: type[Head]) -> None:
    record = HeadRecord(kind="average", features=8 + 16, outputs=3, taps=(1, 7), options={"scale": 2})
    model = PatchedModel.draft(tiny, ScaleBias().blueprint(tiny), record.build())
    images = torch.randn(4, *tiny.input_size)
    model.train()
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    torch.optim.SGD([parameter for _, parameter in model.trainable()], lr=0.1).step()
    patch = decode_patch(encode_patch(model.eval().to_patch(("mine", ["a", "b", "c"]))))
    assert patch.head == record
    with torch.no_grad():
        assert torch.equal(tiny.patched(patch)(images), model(images))
        assert close(BoundPatch(tiny, patch)(images), model(images))
    wide = HeadRecord(kind="average", features=25, outputs=3, taps=(1, 7))
    with pytest.raises(ForeignTensorError, match="reads 25 features; the backbone gives 24"):
        tiny.patched(Patch.of(tiny, patch.task, wide, {}))


def test_a_file_with_a_head_that_is_not_installed_names_the_known_ones(tiny: Backbone, average: type[Head]) -> None:
    head = HeadRecord(kind="average", features=24, outputs=3, taps=(1, 7)).build()
    data = encode_patch(PatchedModel.draft(tiny, Blueprint(), head).to_patch(("mine", "abc")))
    HEADS._registered.pop("average")
    try:
        with pytest.raises(InvalidPatchError, match=r"no head 'average'.* Known: cosine"):
            decode_patch(data)
    finally:
        HEADS._registered["average"] = average
