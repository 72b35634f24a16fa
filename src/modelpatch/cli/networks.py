"""Verbs of frozen networks: `backbone show` and `backbone save`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument

from modelpatch.cli import options as opt
from modelpatch.cli.console import JsonOption, Screen, check_out

backbone = typer.Typer(
    name="backbone",
    help="Show a frozen network, or write it with its weights as one file.",
    no_args_is_help=True,
)
NetworkArgument = Annotated[str, Argument(metavar="NETWORK", help="As for --backbone: timm:NAME, file:PATH, ...")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The safetensors file to write.")]


@backbone.command("show")
def show(
    network: NetworkArgument,
    weights: opt.WeightsOption = None,
    argument: opt.ArgumentOption = None,
    json: JsonOption = None,
) -> None:
    """Load a network as a fit would, and print its blocks, features, preprocessing and fingerprint."""
    console = Screen(json)
    loaded = opt.Network(network, weights, argument).open()
    seen = loaded.preprocessing
    facts: dict[str, Any] = {
        "backbone": loaded.spec,
        "parameters": sum(parameter.numel() for parameter in loaded.module.parameters()),
        "segments": len(loaded.chain),
        "blocks": [block.name for block in loaded.chain.blocks],
        "features": loaded.chain.feature_dim,
        "classifier": loaded.classifier,
        "preprocessing": seen.model_dump(mode="json"),
        "fingerprint": loaded.fingerprint,
    }
    for name, value in facts.items():
        console.tell(f"{name:<14}{', '.join(value) if isinstance(value, list) else value}")
    console.write_json(facts)


@backbone.command("save")
def save(
    network: NetworkArgument,
    out: OutOption,
    weights: opt.WeightsOption = None,
    argument: opt.ArgumentOption = None,
    half: bool = typer.Option(False, "--half", help="Store 16-bit numbers: another backbone, of half the bytes."),
    force: opt.ForceOption = False,
) -> None:
    """Write a network of timm with its weights as one file, which -b file:PATH reads without a network."""
    from modelpatch.backbone.files import check_writable, save_backbone
    from modelpatch.backbone.load import load_backbone

    check_out(out, force)
    loaded = opt.Network(network, weights, argument).open()
    save_backbone(loaded, out, check_writable(loaded), half=half)
    written = load_backbone(f"file:{out}")
    size = f"{out.stat().st_size:,} bytes"
    Screen().tell(f"wrote {out} ({size}, fingerprint {written.fingerprint[:12]}); use it with -b file:{out}")
