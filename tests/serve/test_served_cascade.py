"""A cascade is one task of a server: rows leave it when a stage is sure, whatever else the request asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run, draft_patch
from modelpatch.engine.cascade import Cascade, Confidence
from modelpatch.errors import ServeError
from modelpatch.methods.scale_bias import ScaleBias
from modelpatch.store.store import Store
from modelpatch.tasks.record import TaskRecord
from serving import close, network, picture, serving

pytestmark = pytest.mark.service

PICTURES = [picture(seed, 40) for seed in range(6)]


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    """Two patches at two resolutions of which the first answers half of the pictures."""
    task = TaskRecord(name="fruits", classes=("apple", "pear", "plum"))
    patches = []
    for seed, pixels in enumerate((16, 24)):
        patch = replace(draft_patch(network(), ScaleBias(), seed=seed), task=task)
        patches.append(replace(patch, preprocessing=patch.preprocessing.with_image_size(pixels)))
    with torch.no_grad():
        scores = Confidence().score(network().patched(patches[0])(patches[0].preprocessing(*PICTURES)))
    first = Confidence(threshold=float(scores.quantile(0.5)))
    return Cascade(patches=tuple(patches), confidences=(first, Confidence()))


@pytest.fixture
def running(store: Store, cascade: Cascade) -> Iterator[Any]:
    with serving(store, cascades={"fruits": cascade}) as server:
        yield server


def expected(cascade: Cascade, image: bytes) -> list[float]:
    for patch, confidence in zip(cascade.patches, cascade.confidences, strict=True):
        with torch.no_grad():
            logits = network().patched(patch)(patch.preprocessing(image))
        if bool(confidence.sure(logits)):
            return logits.softmax(1)[0].tolist()
    raise AssertionError


def test_every_image_has_the_answer_of_its_stage(running: Any, cascade: Cascade) -> None:
    with running.client() as client:
        answers = client.predict(PICTURES, tasks=["fruits", "signs"])
        for image, answer in zip(PICTURES, answers, strict=True):
            shares = expected(cascade, image)
            found = dict(answer["fruits"])
            assert all(close(found[name], shares[n]) for n, name in enumerate(cascade.task.classes) if name in found)
            assert len(answer["signs"]) > 0
        mixed = client.predict(PICTURES[:2], per_image=["fruits", "base"])
        assert [list(one) for one in mixed] == [["fruits"], ["base"]]
        assert {"base", "fruits", "flowers"} <= set(client.predict(PICTURES[:1])[0])


def test_its_stages_are_in_the_plan_and_its_name_is_taken(running: Any, cascade: Cascade) -> None:
    with running.client() as client:
        plan = client.plan(["fruits", "base"])
        assert plan["tasks"] == ["fruits", "base"]
        seen: set[str] = set()

        def walk(nodes: list[dict[str, Any]]) -> None:
            for node in nodes:
                seen.update(node["tasks"])
                walk(node["children"])

        walk(plan["tree"])
        assert seen == {"fruits (stage 1)", "fruits (stage 2)", "base"}
        with pytest.raises(ServeError, match="which is a cascade of this server"):
            client.publish("fruits", cascade.patches[0])


def test_the_hash_says_what_is_computed(cascade: Cascade) -> None:
    other = replace(cascade, confidences=(Confidence(threshold=0.1), Confidence()))
    assert len({cascade.content_hash, other.content_hash, replace(cascade, metrics={"a": 1}).content_hash}) == 2


def test_what_cannot_be_served_is_one_line(run: Run, cascade: Cascade, tmp_path: Path) -> None:
    file = cascade.save(tmp_path / "fruits.json")
    base = ["serve", tmp_path / "store", "-b", "bundled:tiny", "--port", 0]
    assert "there is a task 'fruits' already" in run(*base, "--cascade", file, "--cascade", file).err
    assert "--cascade is for servers of this machine" in run(*base, "--cascade", file, "--ray").err
    wrong = run(*base, "--cascade", file)
    assert wrong.code == 1
    assert "this patch was made for module:TinyNet" in wrong.err
