"""Every architecture family: its chain beside its own modules, and every method trained, saved, loaded, bound and run.

    python benchmarks/architectures.py                     every network that has no row yet, then the table
    python benchmarks/architectures.py --only vit --again  those whose names hold `vit`, anew
    python benchmarks/architectures.py --minutes 10        stop after ten minutes; the next call goes on

One small member of each of timm's model files, torchvision's classifiers and transformers' image models, with random weights,
large ones built shallow or narrow. A row says how many repeated blocks the network has and how many the
chain found, whether chain, sizes and features agree with the network, and what became of every method. Rows stand in
`results/architectures.json`, from which `docs/architectures.md` is written.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import modelpatch as mp
from common import machine
from modelpatch.backbone import Preprocessing, Tuning
from modelpatch.backbone.cuts import CONTAINERS, has_children
from modelpatch.data.splits import Split
from modelpatch.data.task import Task
from modelpatch.engine import BoundPatch
from modelpatch.errors import BackboneError, MethodNotApplicableError, ModelpatchError
from modelpatch.methods import METHODS
from modelpatch.tasks.record import TaskRecord

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 320, 384)  # the smallest that a network takes is used
CLASSES = ("red", "green")
WORSE = 2e-3  # of the largest logit, between two ways to the same answer

SMALL_VIT = {"embed_dim": 192, "num_heads": 3, "depth": 4}
ARGUMENTS: dict[str, dict[str, Any]] = {  # the same architecture, shallower or narrower
    "beit_base_patch16_224": SMALL_VIT,
    "cait_xxs24_224": {"depth": 4},
    "davit_tiny": {"embed_dims": (48, 96, 192, 384)},
    "deepseek_vit_412m": {"depth": 3, "embed_dim": 192},
    "gemma4_vit_167m": {"depth": 3, "embed_dim": 192},
    "halonet_h1": {"width_factor": 0.25},
    "hiera_tiny_224": {"embed_dim": 48},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "naflexvit_base_patch16_parfac_gap": SMALL_VIT,
    "nasnetalarge": {"stem_size": 24, "num_features": 1152},
    "qwen3_vit_88m": {"depth": 3, "embed_dim": 192},
    "repvgg_a0": {"width_factor": 0.25},
    "sam2_hiera_tiny": {"embed_dim": 48},
    "samvit_base_patch16_224": {**SMALL_VIT, "global_attn_indexes": (1, 3)},
    "sequencer2d_s": {"layers": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {"embed_dim": 48},
    "swinv2_cr_tiny_224": {"embed_dim": 48},
    "swinv2_tiny_window16_256": {"embed_dim": 48, "window_size": 2},
    "tnt_s_legacy_patch16_224": {"depth": 4},
    "tresnet_m": {"layers": (1, 2, 3, 1)},
    "twins_svt_small": {"embed_dims": (32, 64, 128, 256)},
    "vgg11": {"mlp_ratio": 1 / 32},
    "vit_base_patch16_siglip_224": SMALL_VIT,
    "vit_small_patch14_dinov2": SMALL_VIT,
    "vit_small_patch14_reg4_dinov2": SMALL_VIT,
    "vit_small_patch16_dinov3": SMALL_VIT,
}
TIMM = (
    "beit_base_patch16_224 halonet_h1 test_byobnet repvgg_a0 mobileone_s0 cait_xxs24_224 coat_tiny convit_tiny "
    "convmixer_768_32 test_convnext convnext_atto cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s "
    "cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 densenet121 "
    "dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet mobilenetv2_100 "
    "efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb "
    "vit_small_patch16_dinov3 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny "
    "gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t "
    "inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 "
    "test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs "
    "mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224 "
    "pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvit_m1 res2next50 "
    "resnest14d test_resnet resnet18 resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 "
    "skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 "
    "tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit "
    "vit_tiny_patch16_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 "
    "vit_base_patch16_siglip_224 vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 "
    "vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224 "
)
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 "
    "squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2 "
)

SIZED = (  # built for one size of images
    "beit_base_patch16_224 cait_xxs24_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 convit_tiny "
    "vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 tnt_s_legacy_patch16_224 coat_tiny gmlp_ti16_224 "
    "xcit_nano_12_p8_224 pit_ti_224 nest_tiny swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 mvitv2_tiny "
    "twins_svt_small volo_d1_224 visformer_tiny eva02_tiny_patch14_224 samvit_base_patch16_224 "
    "vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_base_patch16_siglip_224 gcvit_xxtiny levit_128s "
    "efficientformer_l1 efficientformerv2_s0 vitamin_small_224 "
    "test_coatnet test_vit_relpos hiera_tiny_224 deepseek_vit_412m swinv2_tiny_window16_256 "
)
CLASSIFIED = (
    "alexnet",
    "vgg11_bn",
)  # torchvision's with most of their parameters in the classifier, which is built narrower


def names() -> Iterator[str]:
    """The specifications of the sweep."""
    yield from (f"timm:{name}" for name in TIMM.split())
    yield from (f"torchvision:{name}" for name in TORCHVISION.split())
    yield from (f"transformers:{name}" for name in transformers_models())


def transformers_models() -> dict[str, Callable[[], nn.Module]]:
    """transformers' image classifiers, built small from their configs."""
    import transformers

    vit = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    vit |= {"image_size": 64, "patch_size": 16}
    stages = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 2, "image_size": 64}
    convnet = {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}
    kinds: dict[str, dict[str, Any]] = {
        "ViT": vit,
        "DeiT": vit,
        "Beit": vit,
        "Data2VecVision": vit,
        "Dinov2": vit,
        "Dinov2WithRegisters": vit,
        "DINOv3ViT": {**vit, "num_register_tokens": 2},
        "DINOv3ConvNext": {**convnet},
        "Siglip": {"vision_config": vit},
        "CLIP": {"vision_config": vit},
        "Swin": stages,
        "Swinv2": stages,
        "ConvNext": convnet,
        "ConvNextV2": convnet,
        "ResNet": {**convnet, "embedding_size": 8, "layer_type": "basic"},
        "RegNet": {**convnet, "embedding_size": 8, "groups_width": 4},
        "MobileViT": {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
        "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 64},
        "EfficientNet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
        "Segformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
        "Pvt": {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
        },
        "PoolFormer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
    }
    found: dict[str, Callable[[], nn.Module]] = {}
    for kind, config in kinds.items():
        model, settings = (getattr(transformers, f"{kind}{end}", None) for end in ("ForImageClassification", "Config"))
        if model is not None and settings is not None:
            found[kind] = partial(_build, model, settings, config)
    return found


def _build(model: Any, settings: Any, config: dict[str, Any]) -> nn.Module:
    return Logits(model(settings(**config)))


class Logits(nn.Module):
    """A model of transformers from pixels to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def load(spec: str) -> mp.Backbone:
    """The backbone at the smallest size of images that it takes."""
    source, _, name = spec.partition(":")
    given = dict(ARGUMENTS.get(name, {}))
    problem: Exception | None = None
    for pixels in SIZES:
        torch.manual_seed(0)
        seen = Preprocessing(input_size=(3, pixels, pixels), crop_pct=1.0)
        sized: dict[str, Any] = {"img_size": pixels} if name in SIZED.split() else {}
        if name == "vit_b_16":
            sized = {"image_size": pixels}
        try:
            if source == "transformers":
                return mp.load_backbone(transformers_models()[name](), preprocessing=seen)
            if source == "torchvision" and name in CLASSIFIED:
                return mp.load_backbone(narrowed(name), preprocessing=seen)
            return mp.load_backbone(spec, pretrained=False, preprocessing=seen, **given, **sized)
        except BackboneError as error:
            problem = error
    assert problem is not None
    raise problem


def narrowed(name: str) -> nn.Module:
    """A network of torchvision with 64 channels between the layers of its classifier."""
    module: Any = torchvision.models.get_model(name)
    layers = [layer for layer in module.classifier if isinstance(layer, nn.Linear)]
    widths = [layers[0].in_features, *[64] * (len(layers) - 1), layers[-1].out_features]
    narrow = iter(starmap(nn.Linear, pairwise(widths)))
    kept = (next(narrow) if isinstance(layer, nn.Linear) else layer for layer in module.classifier)
    module.classifier = nn.Sequential(*kept)
    return module


def count_repeats(module: nn.Module) -> int:
    """Blocks that the network repeats: the most members of containers of one class that hold no such blocks themselves."""
    counts: Counter[type[nn.Module]] = Counter()

    def visit(parent: nn.Module) -> bool:
        """Count below `parent`. Returns True if something was."""
        found = False
        for child in parent.children():
            below = visit(child)
            is_member = isinstance(parent, CONTAINERS) and not isinstance(child, CONTAINERS) and has_children(child)
            weights = sum(parameter.ndim > 1 for parameter in child.parameters())
            if is_member and not below and weights > 1:
                counts[type(child)] += 1
            found |= below or (is_member and weights > 1)
        return found

    visit(module)
    return max(counts.values(), default=0)


def measure(spec: str, light: bool) -> dict[str, Any]:
    """The row of a network; `light` ones try no method."""
    begin = time.perf_counter()
    backbone = load(spec)
    seconds = time.perf_counter() - begin
    chain, pixels = backbone.chain, backbone.input_size[1]
    row: dict[str, Any] = {"pixels": pixels, "parameters": sum(p.numel() for p in backbone.module.parameters())}
    row |= {"segments": len(chain), "blocks": len(chain.blocks), "repeats": count_repeats(backbone.module)}
    row |= {"features": chain.feature_dim, "load_seconds": round(seconds, 2)}
    with torch.no_grad():
        row["batches"] = all(agree(features(backbone, x), chain(x)) for x in map(backbone_images(backbone), (1, 3)))
        row["sizes"] = [size for size in (2 * pixels, pixels + pixels // 2) if takes(backbone, size)]
    row["methods"] = {} if light else {name: try_method(backbone, name) for name in METHODS.names()}
    backbone.verify()
    return row


def backbone_images(backbone: mp.Backbone, pixels: int | None = None) -> Callable[[int], Tensor]:
    size = (3, *((pixels,) * 2 if pixels else backbone.input_size[1:]))
    return lambda rows: torch.randn(rows, *size, generator=torch.Generator().manual_seed(rows))


def features(backbone: mp.Backbone, x: Tensor) -> Tensor:
    """What the network's own code gives before its classifier."""
    module: Any = backbone.module
    if hasattr(module, "forward_features") and hasattr(module, "forward_head"):
        return module.forward_head(module.forward_features(x), pre_logits=True).flatten(1)
    found: list[Tensor] = []
    if backbone.classifier is None:
        return module(x).flatten(1)
    classifier = module.get_submodule(backbone.classifier)
    handle = classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    module(x)
    handle.remove()
    read = found[0]
    return read.mean((2, 3)) if read.ndim == 4 and read.shape[2] > 1 else read.flatten(1)


def takes(backbone: mp.Backbone, pixels: int) -> bool:
    """True if the chain runs images of this size as the network does; False where neither does. Raises for a difference."""
    x = backbone_images(backbone, pixels)(2)
    try:
        expected = features(backbone, x)
    except Exception:
        return False
    try:
        given = backbone.chain(x)
    except Exception:
        if expected.shape[1] != backbone.chain.feature_dim:
            return False
        raise
    if given.shape[1] != backbone.chain.feature_dim:  # a size that the library refuses
        return False
    if not agree(expected, given):
        raise AssertionError(f"the chain differs from the network at {pixels} px")
    return True


def agree(expected: Tensor, given: Tensor) -> bool:
    """True if two ways to one answer differ by rounding alone."""
    return expected.shape == given.shape and bool((expected - given).abs().max() <= WORSE * expected.abs().max() + 1e-6)


def pictures(pixels: int) -> Task:
    """Two training and two test pictures, one of each colour: a step of training."""
    generator = np.random.default_rng(0)

    def split(rows: int) -> Split:
        labels = np.arange(rows) % len(CLASSES)
        images = generator.integers(0, 120, (rows, pixels, pixels, 3), dtype=np.uint8)
        images[np.arange(rows), :, :, labels] += 120
        return Split(list(images), labels.astype(np.int64))

    return Task(TaskRecord(name="colors", classes=CLASSES), split(2), split(2))


def try_method(backbone: mp.Backbone, name: str) -> str:
    """`ok`, why a method does not apply, or what failed."""
    try:
        method = METHODS[name]()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "patch.safetensors"
            patch = mp.fit(backbone, pictures(backbone.input_size[1]), method, epochs=1, batch_size=2, seed=0)
            patch.save(path)
            loaded = mp.Patch.load(path)
        x = backbone_images(backbone)(2)
        with torch.no_grad():
            model, bound = backbone.patched(loaded)(x), BoundPatch(backbone, loaded)(x)
        answers = mp.Engine(backbone, {"task": loaded}, tuning=Tuning())(x)
        if not torch.isfinite(model).all():
            return "failed: logits that are not finite"
        for way, given, expected in (
            ("bound", bound, model),
            ("engine", answers["task"], model),
            ("base", answers["base"], backbone(x)),
        ):
            if not agree(expected, given):
                return f"failed: {way} differs by {float((given - expected).abs().max()):.2g}"
        return "ok"
    except MethodNotApplicableError as error:
        return f"not applicable: {error}"
    except ModelpatchError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"[:500]


def sweep(only: str, again: bool, light: bool, minutes: float, part: tuple[int, int]) -> None:
    """Measure the networks that have no row yet, every `part[1]`-th of them, and write the file after each."""
    end = time.monotonic() + 60 * minutes
    for spec in [name for name in names() if only in name][part[0] :: part[1]]:
        known = read_rows().get(spec, {})
        if not again and ("failed" in known or known.get("methods") or (known and light)):
            continue
        begin = time.perf_counter()
        try:
            row = measure(spec, light)
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}"[:500]}
        row["seconds"] = round(time.perf_counter() - begin, 1)
        print(spec, summary(row), flush=True)
        write_row(spec, row)
        gc.collect()
        if time.monotonic() > end:
            break


def read_rows() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}


def write_row(spec: str, row: dict[str, Any]) -> None:
    """Add a row to the file, which several processes may write."""
    with (Path(tempfile.gettempdir()) / "architectures.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {**read_rows(), spec: row}
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    counts = Counter(result.partition(":")[0] for result in row["methods"].values())
    found = f"{row['blocks']} blocks of {row['repeats']}, {len(row['sizes'])} sizes, {dict(counts)}, {row['seconds']} s"
    bad = [f"{name} {text}" for name, text in row["methods"].items() if text.startswith(("failed", "refused"))]
    return "; ".join([found, *([] if row["batches"] else ["FEATURES DIFFER"]), *bad])


def write_page(rows: dict[str, Any]) -> None:
    """The table of `docs/architectures.md`, below its marker."""
    head, marker, _ = PAGE.read_text().partition("<!-- table -->\n")
    lines = ["| network | parameters | pixels | segments | blocks | repeated | other sizes | methods | do not apply |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|--:|---|"]
    for spec in names():
        row = rows.get(spec, {"failed": "not measured"})
        if "failed" in row:
            lines.append(f"| `{spec}` | {row['failed'].splitlines()[0][:80]} | | | | | | | |")
            continue
        results = row["methods"].items()
        applied = f"{sum(text == 'ok' for _, text in results)} of {len(results)}" if results else "not tried"
        left = ", ".join(name for name, text in results if text.startswith("not applicable"))
        failed = ", ".join(f"**{name}**" for name, text in results if text.startswith(("failed", "refused")))
        sizes = ", ".join(map(str, row["sizes"])) or "none"
        facts = (
            f"{row['parameters'] / 1e6:.1f} M",
            row["pixels"],
            row["segments"],
            row["blocks"],
            row["repeats"],
            sizes,
            applied,
        )
        lines.append(f"| `{spec}` | {' | '.join(map(str, facts))} | {', '.join(filter(None, (left, failed)))} |")
    PAGE.write_text(head + marker + "\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--light", action="store_true", help="chains, features and sizes; no methods")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--part", default="0/1", help="1/3: the second of three shares, for several processes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    first, count = map(int, options.part.split("/"))
    sweep(options.only, options.again, options.light, options.minutes, (first, count))
    write_page(read_rows())
