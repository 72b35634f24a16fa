"""The options of PEFT's `adapter_config.json`, and the layers of a backbone that PEFT adapts under them."""

import json
import re
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, PositiveFloat, StringConstraints, ValidationError
from torch import nn

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.clone import clone_module
from modelpatch.errors import InvalidPatchError, NotAPatchError, require
from modelpatch.methods.lora import ADAPTER, Rank
from modelpatch.plain_files import read_plain

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FEATURE = "PEFT's folder format"
# Options without effect on what a finished adapter computes: where it comes from, and how it was trained and stored.
WITHOUT_EFFECT = frozenset(
    {
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",  # of GPT-2's Conv1D, which is refused as a layer
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that leave the base's weights
WORDS = ("all-linear",)  # what PEFT does not read as an expression
NONE = "(?!)"  # an expression that nothing matches
SECONDS, MOST_PATTERN = 0.3, 2**18  # for all names, and characters, of an expression
Plain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,256}$")]  # PEFT puts it into an expression


class AdapterConfig(BaseModel, frozen=True, extra="allow"):
    """The options of `adapter_config.json` that a patch supports; all others must be off (see `read_config`)."""

    peft_type: Literal["LORA"] = "LORA"
    r: Rank
    lora_alpha: PositiveFloat
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Plain | list[Plain] | None = None
    modules_to_save: list[str] | None = None


@dataclass(frozen=True)
class Update:
    """The update of a layer: `key` begins its tensors' names in PEFT's file, `attention` says that the layer is one.

    `idle` updates have no effect: `nn.MultiheadAttention` reads the weight of its output projection itself.
    """

    key: str
    rank: int
    alpha: float
    attention: bool
    idle: bool


@dataclass(frozen=True)
class Adapted:
    """Updates by the backbone's names of their layers, and all keys of PEFT's file with the base's names of their tensors.

    The name is empty for tensors of updates, and for those of `original_module`, which PEFT stores and does not use.
    """

    updates: dict[str, Update]
    keys: dict[str, str]


def read_config(folder: Path) -> AdapterConfig:
    """The options. Raises `InvalidPatchError` for one that changes the adapter's output and that a patch does not support."""
    try:
        config = AdapterConfig.model_validate(json.loads(read_plain(folder / CONFIG)))
    except OSError as error:
        raise NotAPatchError(f"{folder} is not a PEFT folder: {CONFIG} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = first["loc"][0] if first["loc"] else "the whole"
        given = f"{where} = {first['input']!r}"
        raise InvalidPatchError(f"{folder / CONFIG}: {given} is not valid: {first['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise NotAPatchError(f"{folder / CONFIG} is not valid JSON: {error}.") from error
    defaults = require("peft", "lora", FEATURE).LoraConfig().to_dict()
    for name, value in (config.model_extra or {}).items():
        harmless = name in WITHOUT_EFFECT or (name == "init_lora_weights" and value in STARTS)
        if value and not harmless and value != defaults.get(name):  # null, false and empty mean that an option is off
            hint = "Train the adapter without that option."
            if name == "init_lora_weights":
                hint = (
                    "That start changes the base: save with path_initial_model_for_weight_conversion to get plain LoRA."
                )
            raise InvalidPatchError(
                f"{folder / CONFIG}: a patch does not support {name}={value!r}. Expected LoRA, rsLoRA or DoRA. {hint}"
            )
    return config


def adapt(config: AdapterConfig, backbone: Backbone) -> Adapted:
    """Adapt a structural clone by PEFT itself. Raises `InvalidPatchError` where it cannot."""
    peft = require("peft", "lora", FEATURE)
    names, own = [name for name, _ in backbone.module.named_modules() if name], backbone.module.state_dict().keys()
    clone = clone_module(backbone.module)
    try:
        given = peft.LoraConfig(**_safe_fields(config, names))
        with warnings.catch_warnings(action="ignore"):  # of the names in place of patterns, and of shapes on no device
            peft.inject_adapter_in_model(given, clone, ADAPTER, low_cpu_mem_usage=True)
            stored = peft.get_peft_model_state_dict(clone, adapter_name=ADAPTER, save_embedding_layers=False)
    except (LookupError, TypeError, ValueError, RuntimeError, NotImplementedError, re.error) as error:
        raise InvalidPatchError(f"PEFT cannot adapt {backbone.spec} as {CONFIG} says: {error}") from error
    updates, modules = dict[str, Update](), dict(clone.named_modules())
    for name, module in modules.items():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer = _plain(name, names)
            attention = isinstance(module, peft.tuners.lora.layer.MultiheadAttention)
            inside = ".base_layer." not in name and isinstance(
                modules.get(name.rpartition(".")[0]), nn.MultiheadAttention
            )
            sizes = module.r[ADAPTER], module.lora_alpha[ADAPTER]
            updates[layer] = Update(f"{PREFIX}{name}", *sizes, attention=attention, idle=inside)
    return Adapted(updates, {f"{PREFIX}{key}": _plain(key, own) for key in stored})


def _plain(key: str, own: Collection[str]) -> str:
    """The base's name of a tensor or module that PEFT has wrapped; empty for those that the base does not have."""
    names = (key, key.replace(".base_layer", ""), key.replace(".modules_to_save.", "."))
    return next((name for name in names if name in own), "")


@cache
@torch.no_grad()
def output_times() -> int:
    """Measure how many times the installed PEFT adds the update of an output projection of attention (0.21 does twice)."""
    peft = require("peft", "lora", FEATURE)
    holder = nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)})
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attention"]), holder, ADAPTER)
    layer: Any = holder["attention"]
    projection = layer.base_layer.out_proj
    for part in (projection.lora_A, projection.lora_B):
        part[ADAPTER].weight.fill_(1)
    before = float(projection.get_base_layer().weight)
    layer.merge()
    return round(float(projection.get_base_layer().weight) - before)


def _safe_fields(config: AdapterConfig, names: Sequence[str]) -> dict[str, Any]:
    """The options for PEFT, with names in place of expressions, which a hostile folder could make endless."""
    fields: dict[str, Any] = config.model_dump(
        include=set(AdapterConfig.model_fields) - {"peft_type"}, exclude_none=True
    )
    for field in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(field), str) and fields[field] not in WORDS:
            matched = match_within(fields[field], names, f"{CONFIG}: {field}")
            fields[field] = "|".join(map(re.escape, matched)) or NONE
    for field in ("rank_pattern", "alpha_pattern"):
        values: dict[str, Any] = {}
        for pattern, value in fields.get(field, {}).items():
            for name in match_within(rf"(.*\.)?({pattern})", names, f"{CONFIG}: {field}"):
                values.setdefault(f"^{re.escape(name)}", value)
        fields[field] = values
    return fields


def match_within(pattern: str, names: Sequence[str], where: str) -> list[str]:
    """The names that an expression matches as a whole. Raises `InvalidPatchError` for none, and for one without an end."""
    regex = require("regex", "lora", FEATURE)
    end = time.monotonic() + SECONDS
    try:
        compiled = regex.compile(pattern[: MOST_PATTERN + 1])
        if len(pattern) > MOST_PATTERN:
            raise TimeoutError
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.001))]
    except (TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise InvalidPatchError(
            f"{where} = {pattern[:80]!r} takes too long to match {len(names)} modules. Name the layers in a list."
        ) from error
    except regex.error as error:
        raise InvalidPatchError(f"{where} = {pattern[:80]!r} is no regular expression: {error}") from error
