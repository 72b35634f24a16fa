"""`transformers:NAME_OR_FOLDER`: a vision model of transformers, from the hub, from a folder that `save_pretrained` wrote, or
(with `pretrained=False`) the architecture of that name: `transformers:vit`.

The features are what the model's own classifier reads; of a checkpoint without one they are what the architecture's classifier
would read, and of towers (CLIP, SigLIP, DINOv3) the pooled output, after the projection where the checkpoint has it.
Weights are read from safetensors alone, and no code of a repository is run.
"""

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.processor import preprocessing_of_processor
from modelpatch.backbone.reach import HUB
from modelpatch.backbone.sources.base import BackboneSource, BuiltNetwork, check_size, register_source
from modelpatch.backbone.transformers_network import TransformersNetwork, image_size_of
from modelpatch.errors import BackboneError, UnknownBackboneError, require, warn_caller
from modelpatch.text import first_line, nearest

PICKLES = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")
PROCESSOR = "preprocessor_config.json"
UNUSED = ("classifier", "head", "pooler", "cls_classifier", "distillation_classifier", "mask_token", "decoder")


@register_source("transformers")
class TransformersSource(BackboneSource):
    """transformers' vision models."""

    address = HUB
    outputs = "num_labels"

    def is_portable(self, name: str) -> bool:
        owner, _, repository = name.rpartition("/")
        return "/" not in owner and Path(repository).name == repository and not name.startswith((".", "/", "~", "\\"))

    def find_repository(self, name: str) -> str | None:
        return name if "/" in name and not self.names_file(name) else None

    def names_file(self, name: str) -> bool:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return (
            Path(name).expanduser().is_dir()
            or (not self.is_portable(name))
            or ("/" not in name and name not in CONFIG_MAPPING_NAMES)
        )

    def build(self, name: str, pretrained: bool, arguments: dict[str, Any]) -> BuiltNetwork:
        """The network with its processor's preprocessing.

        Raises `MissingExtraError` without transformers, `UnknownBackboneError` for a name that is nothing there,
        `BackboneError` for pickled weights, code of a repository, models of other things than images, and weights that
        do not fit.
        """
        require("transformers", "transformers", f"The backbone transformers:{name}")
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        folder = Path(name).expanduser() if self.names_file(name) else None
        if folder is not None and not folder.is_dir():
            hint = nearest(name, CONFIG_MAPPING_NAMES)
            raise UnknownBackboneError(
                f"there is no folder {str(folder)[:200]!r} that save_pretrained wrote, and no architecture of that "
                f"name.{hint} Expected transformers:OWNER/NAME, a folder, or (with pretrained=False) an architecture: vit."
            )
        if folder is not None and not (folder / "config.json").is_file():
            raise UnknownBackboneError(f"{folder} has no config.json. Expected a folder that save_pretrained wrote.")
        if pretrained and folder is None and name in CONFIG_MAPPING_NAMES:
            raise UnknownBackboneError(
                f"transformers:{name} is an architecture without weights. Name a repository of them, OWNER/NAME, or a folder; "
                "random weights: pretrained=False."
            )
        place = name if folder is None else str(folder)
        with quiet(), telling(name, folder):
            config = _configure(place, arguments)
            if arguments:
                check_size(lambda: _draw(config), f"transformers:{name} with {arguments}")
            model = _load(place, config) if pretrained else _draw(config)
        processor, default = _processor(place, config)
        pixels = image_size_of(model.config)
        seen, flips = preprocessing_of_processor(processor, pixels, f"transformers:{name}", default)
        spec = None if folder is None else f"transformers:{folder.resolve().name}"
        return BuiltNetwork(module=TransformersNetwork(model, flips), preprocessing=seen, spec=spec)


def wrap_model(module: nn.Module, preprocessing: Preprocessing | None) -> BuiltNetwork | None:
    """The network of a model of transformers that a caller built, without names of its own; None for any other module."""
    if not any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__):
        return None
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    model = _with_own_pooling(module)
    _check_images(model)
    flips = False
    if preprocessing is None:
        processor = default_processor(model.config)
        preprocessing, flips = preprocessing_of_processor(
            processor, image_size_of(model.config), type(module).__name__, default=True
        )
    spec = f"module:{type(module).__name__}"
    return BuiltNetwork(module=TransformersNetwork(model, flips), preprocessing=preprocessing, spec=spec, arguments={})


def _configure(place: str, arguments: dict[str, Any]) -> Any:
    """The configuration with arguments set. Raises `BackboneError` for one that it does not have."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    known = place in CONFIG_MAPPING_NAMES
    config = CONFIG_MAPPING[place]() if known else AutoConfig.from_pretrained(place, trust_remote_code=False)
    tower = getattr(config, "vision_config", None)
    for key, value in arguments.items():
        owner = config if hasattr(config, key) else tower
        if owner is None or not hasattr(owner, key):
            hint = nearest(key, vars(config))
            raise BackboneError(f"the configuration {type(config).__name__} has no {key!r}.{hint}")
        setattr(owner, key, value)
    return config


def tower_class(config: Any) -> Any:
    """The class of the image network of a configuration. Raises `BackboneError` for one of something else than images."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    own = getattr(transformers, named, None)
    if own is not None and "ForImageClassification" in named:
        return own
    if (hasattr(config, "vision_config") and named.endswith("Model")) or (
        own is None and hasattr(config, "vision_config")
    ):
        stem = (named or f"{type(config).__name__.removesuffix('Config')}Model").removesuffix("Model")
        for ending in ("VisionModelWithProjection", "VisionModel"):
            if (found := getattr(transformers, stem + ending, None)) is not None:
                return found
    if own is not None and named.endswith(("VisionModel", "VisionModelWithProjection", "Backbone")):
        return own
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if type(config) in MODEL_MAPPING:
        return MODEL_MAPPING[type(config)]
    raise BackboneError(
        f"transformers has no image model of {type(config).__name__} ({named or 'no architecture named'})."
    )


def _draw(config: Any) -> Any:
    """The model with random weights."""
    kind = tower_class(config)
    model = kind(config.vision_config if "Vision" in kind.__name__ and hasattr(config, "vision_config") else config)
    _check_images(model)
    return model


def _load(place: str, config: Any) -> Any:
    """The model with its weights. Raises `BackboneError` where some that its features need are missing."""
    kind = tower_class(config)
    named = next(iter(config.architectures or ()), "")
    if "ForImageClassification" in kind.__name__ and kind.__name__ != named:
        config = copy.deepcopy(config)
        config.num_labels = 0  # no classifier: the checkpoint has none
    inner = config.vision_config if "Vision" in kind.__name__ and hasattr(config, "vision_config") else config
    model, info = kind.from_pretrained(
        place,
        config=inner,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        dtype=torch.float32,
    )
    _check_images(model)
    missing = sorted(name for name in info["missing_keys"] if not any(part in UNUSED for part in name.split(".")))
    wrong = [key for key, *_ in info.get("mismatched_keys", ())]
    if missing or wrong:
        raise BackboneError(
            f"{place} lacks {len(missing)} tensors of {kind.__name__} ({', '.join([*missing, *wrong][:3])}), {len(wrong)} "
            "have another shape. Expected the weights of that architecture."
        )
    return model


def _check_images(model: Any) -> None:
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise BackboneError(
            f"{type(model).__name__} reads {model.main_input_name!r}, not images alone. Expected a model of images, or the "
            "vision tower of one of images and text."
        )
    if "spatial_shapes" in inspect.signature(model.forward).parameters:
        raise BackboneError(
            f"{type(model).__name__} reads lists of patches with the shape of each picture (NaFlex), which is not supported. "
            "Expected a model of square images: the SigLIP 2 checkpoints that name their pixels are."
        )


def _with_own_pooling(model: Any) -> Any:
    """A model without a classifier as the trunk of its architecture's classifier, which says how its output is pooled."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    config = model.config
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):
        kind = tower_class(config)
        with torch.device("meta"):
            tower = kind._from_config(config.vision_config)
        for name, _ in list(tower.named_children()):
            setattr(
                tower, name, getattr(model, name, None) if hasattr(model, name) else getattr(model.vision_model, name)
            )
        return tower
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or type(model) is not MODEL_MAPPING.get(
        type(config), None
    ):
        return model
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = found[0] if isinstance(found, tuple) else found
    config = copy.deepcopy(config)
    config.num_labels = 0
    with torch.device("meta"):
        shell = kind(config)
    if shell.base_model_prefix not in dict(shell.named_children()):
        return model
    setattr(shell, shell.base_model_prefix, model)
    return model if any(tensor.is_meta for tensor in shell.parameters()) else shell.eval()


def _processor(place: str, config: Any) -> tuple[Any, bool]:
    """The image processor of a repository or folder, else the one that its architecture has by default, and True."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if place in CONFIG_MAPPING_NAMES:
        return default_processor(config), True
    if (
        Path(place).is_dir()
        and not (Path(place) / PROCESSOR).is_file()
        and not (Path(place) / "processor_config.json").is_file()
    ):
        warn_caller(
            f"{place} has no {PROCESSOR}: images are seen as transformers does by default for {config.model_type}."
        )
        return default_processor(config), True
    with quiet(), telling(place, None):
        return AutoImageProcessor.from_pretrained(place, trust_remote_code=False), False


def default_processor(config: Any) -> Any:
    """The image processor of an architecture with its defaults; None where transformers has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    tower = getattr(config, "vision_config", config)
    whole = (
        CONFIG_MAPPING[name]()
        if (name := tower.model_type.removesuffix("_vision_model")) in CONFIG_MAPPING_NAMES
        else tower
    )
    for one in (config, tower, whole):
        if type(one) in IMAGE_PROCESSOR_MAPPING:
            kinds = IMAGE_PROCESSOR_MAPPING[type(one)]
            kinds = list(kinds.values()) if isinstance(kinds, dict) else list(kinds)
            kind = next((kind for kind in kinds if kind is not None), None)
            if kind is not None:
                with quiet():
                    return kind()
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's reports of loading, whose content is checked and told here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    from transformers.utils import logging as own

    shown = own.is_progress_bar_enabled()
    own.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(level)
        if shown:
            own.enable_progress_bar()


@contextmanager
def telling(name: str, folder: Path | None) -> Iterator[None]:
    """Turn what transformers raises into a `BackboneError` that says what is in the way."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:
        pickled = [path.name for kind in PICKLES for path in sorted(folder.glob(kind))] if folder else []
        text = str(error)
        foreign = "trust_remote_code" in text or "custom code" in text
        if pickled and not foreign and not list(folder.glob("*.safetensors") if folder else ()):
            raise BackboneError(
                f"{folder} has pickled weights alone ({pickled[0]}), which are not read. Write it anew with a recent "
                "transformers: model.save_pretrained(folder), which writes model.safetensors."
            ) from error
        if foreign:
            raise BackboneError(
                f"transformers:{name} needs code of its repository, which is never run. Expected one of transformers' own."
            ) from error
        raise BackboneError(f"transformers could not build {name!r}: {first_line(error)}") from error
