"""One graph of several tasks: it answers as the engine does, without this library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import draft_patch, make_timm
from dense import square_task
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.chain import NoHead
from modelpatch.backbone.tuning import Tuning
from modelpatch.engine.engine import Engine
from modelpatch.engine.graph import PlanGraph
from modelpatch.errors import EngineError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.methods.subset import Subset
from modelpatch.patch.contents import Patch
from modelpatch.train import fit
from tolerance import close

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(tiny: Backbone) -> Engine:
    """A classification that patches the last block, one that patches norms, and a segmentation, seen stretched."""
    patches: dict[str, Patch] = {
        "last": draft_patch(tiny, Subset()),
        "norms": draft_patch(tiny, ScaleBias(), seed=1),
        "squares": fit(tiny, square_task(4), ScaleBias(), epochs=1, batch_size=4),
    }
    return Engine(tiny, patches, tuning=Tuning())


def normalised(engine: Engine, count: int) -> list[torch.Tensor]:
    """A batch for every preprocessing, in order."""
    kinds = dict.fromkeys(engine.preprocessing(name) for name in engine)
    return [torch.randn(count, *one.input_size, generator=torch.Generator().manual_seed(count)) for one in kinds]


def answers(engine: Engine, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    kinds = dict.fromkeys(engine.preprocessing(name) for name in engine)
    return engine(dict(zip(kinds, batches, strict=True)))


def test_an_onnx_graph_of_all_tasks_answers_as_the_engine_in_batches_of_any_size(
    engine: Engine, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session: Any = onnxruntime.InferenceSession(str(engine.export(tmp_path / "tasks.onnx")))
    names = [one.name for one in session.get_inputs()]
    assert names == ["images_0", "images_1"]
    assert [one.name for one in session.get_outputs()] == ["base", "last", "norms", "squares"]
    for count in (1, 3):
        batches = normalised(engine, count)
        given = dict(zip(names, (one.numpy() for one in batches), strict=True))
        expected = answers(engine, batches)
        for name, found in zip(expected, session.run(None, given), strict=True):
            assert close(torch.from_numpy(found), expected[name])
    facts = session.get_modelmeta().custom_metadata_map
    tasks = json.loads(facts["tasks"])
    assert tasks["squares"] == {
        "kind": "segmentation",
        "classes": list(engine.classes("squares")),
        "options": {},
        "input": "images_1",
    }
    assert json.loads(facts["inputs"])["images_0"] == engine.preprocessing("base").model_dump(mode="json")


def test_the_graph_computes_what_tasks_share_once(engine: Engine) -> None:
    graph = PlanGraph(engine.backbone, engine._choose(["base", "last"]))
    assert len(graph.links) == len(engine.backbone.chain) + 1  # the last block twice, all else once


def test_a_program_of_torch_export_answers_alike(engine: Engine, tmp_path: Path) -> None:
    program = torch.export.load(engine.export(tmp_path / "tasks.pt2", ["last", "norms"])).module()
    images = normalised(engine, 5)[0]
    expected = engine(images, only=["last", "norms"])
    for name, found in zip(expected, program(images), strict=True):
        assert close(found, expected[name])


def test_a_base_whose_answer_is_not_made_of_its_features_is_exported_whole(tmp_path: Path) -> None:
    # two classifiers, whose answers are averaged
    backbone = make_timm("deit_tiny_distilled_patch16_224", 32, img_size=32, depth=2)
    assert isinstance(backbone.chain.head, NoHead)
    engine = Engine(backbone, {"colors": draft_patch(backbone)}, tuning=Tuning())
    program = torch.export.load(engine.export(tmp_path / "tasks.pt2")).module()
    images = torch.randn(3, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    for name, found in zip(engine, program(images), strict=True):
        assert close(found, engine(images)[name])


def test_what_a_graph_cannot_hold_is_refused_by_name(engine: Engine, tiny: Backbone, tmp_path: Path) -> None:
    engine.add("sizes", [draft_patch(tiny), draft_patch(tiny, seed=3)])
    with pytest.raises(EngineError, match="sizes has several patches"):
        engine.export(tmp_path / "x.onnx")
    with pytest.raises(EngineError, match=r"'\.tflite'; expected one of: \.pt2, \.onnx"):
        engine.export(tmp_path / "x.tflite", ["last"])
    with pytest.raises(EngineError, match="no tasks"):
        engine.export(tmp_path / "x.onnx", [])
