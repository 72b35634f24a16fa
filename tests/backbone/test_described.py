"""What a file says of a network is plain, short and harmless, or refused before anything is built."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import HOSTILE_ARGUMENTS
from modelpatch.backbone.files import MAX_METADATA, MAX_NUMBER, Described, check_arguments
from modelpatch.errors import BackboneError

GOOD = {
    "architecture": "convnext_atto.d2_in1k",
    "arguments": {
        "num_classes": 3,
        "act_layer": "relu",
        "dims": [8, [16, 32]],
        "bn_eps": 1e-5,
        "conv_mlp": True,
        "a": None,
    },
    "preprocessing": {"crop_pct": 1.0, "mean": [0, 0.5, 1]},
    "classes": ["a", "b", "c"],
    "about": {"licence": "MIT", "figures": {"top1": [0.5]}, "text": "two\nlines"},
}


def test_a_description_is_read_as_it_was_written() -> None:
    described = Described.parse(json.dumps(GOOD), "x")
    assert described.model_dump(mode="json", exclude_unset=True) == GOOD
    assert Described.parse(json.dumps(GOOD | {"preprocessing": None, "later": 1}), "x").preprocessing is None


@pytest.mark.parametrize(("name", "value"), HOSTILE_ARGUMENTS)
def test_an_argument_that_could_do_harm_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"a file cannot set|is no plain value|cannot be printed"):
        check_arguments({"num_classes": 3, name: value})
    with pytest.raises(BackboneError, match="the metadata of x does not describe a backbone: 'arguments'") as caught:
        Described.parse(json.dumps(GOOD | {"arguments": {name: value}}), "x")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [MAX_NUMBER, -MAX_NUMBER, [MAX_NUMBER], 0.1, "word", False, None, []])
def test_plain_values_are_accepted(value: object) -> None:
    assert check_arguments({"drop_path_rate": value}) == {"drop_path_rate": value}


@pytest.mark.parametrize("value", [MAX_NUMBER + 1, float("nan"), float("inf"), {}, object(), b"x"])
def test_values_that_are_not_plain_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"drop_path_rate = .* is no plain value"):
        check_arguments({"drop_path_rate": value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("architecture", value)
            for value in ("", "hf-hub:a/b", "local-dir:a", "../a", "a/b", "a b", "a\n", "a" * 1000, 3, None)
        ],
        *[("arguments", value) for value in ([], None, "x", 3)],
        *[
            ("preprocessing", value)
            for value in ([], 3, {"crop_pct": True}, {"crop_pct": 7}, {"mean": "0.5"}, {"x": 1})
        ],
        *[("classes", value) for value in ("abc", 3, None, [1, 2, 3], ["\x1b[31m"], ["a" * 1000])],
        *[("about", value) for value in ("x", None, [])],
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BackboneError, match=f"the metadata of x does not describe a backbone: '{field}") as caught:
        Described.parse(json.dumps(GOOD | {field: value}), "x")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "no json", "[]", "3", "{}", "[" * 10**5, '{"a":' * 10**4])
def test_text_that_describes_nothing_is_refused(text: str) -> None:
    with pytest.raises(BackboneError, match="does not describe a backbone"):
        Described.parse(text, "x")


def test_metadata_beyond_any_use_is_not_even_parsed() -> None:
    with pytest.raises(BackboneError, match=f"at most {MAX_METADATA:,} are read"):
        Described.parse(json.dumps(GOOD) + " " * MAX_METADATA, "x")
