"""Write the seeds of the fuzz corpus: one small patch of every kind, as the parts of its file and, one of them, whole.

PYTHONPATH=tests python tests/fuzz/seeds.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from patch_parser import CORPUS, split

from conftest import draft_patch, make_tiny
from modelpatch import methods
from modelpatch.heads.base import HeadRecord
from modelpatch.patch.codec import snap_signs, snap_sizes
from modelpatch.patch.contents import Patch, encode_patch


def make_patches() -> dict[str, Patch]:
    """A patch for every kind of tensor, head and codec."""
    tiny = make_tiny()
    probe = draft_patch(tiny)
    generator = torch.Generator().manual_seed(0)
    masks = {
        "stage1.0.conv2.weight": torch.rand(8, 8, 1, 1, generator=generator) < 0.9,
        "stage2.1.conv2.weight": torch.rand(16, 16, 1, 1, generator=generator) < 0.02,
    }
    change = torch.randn(16, 16, 1, 1, generator=generator)
    low = {
        "left/stage2.1.conv2.weight": torch.randn(16, 2, generator=generator),
        "right/stage2.1.conv2.weight": torch.randn(2, 16, generator=generator),
    }

    def with_tensors(**tensors: torch.Tensor) -> Patch:
        return replace(probe, tensors={**probe.tensors, **tensors})

    return {
        "linear-probe": probe,
        "scale-bias": draft_patch(tiny, methods.ScaleBias()),
        "float16": draft_patch(tiny).astype("float16"),
        "bfloat16": draft_patch(tiny).astype("bfloat16"),
        "int8": draft_patch(tiny, methods.Subset(blocks=("stage2.1",))).astype("int8"),
        "delta": draft_patch(tiny, methods.DeltaNetwork(modules=1)),
        "bits": with_tensors(**{f"mask/{name}": mask for name, mask in masks.items()}),
        "trits": with_tensors(
            **{f"mask/{n}": m * torch.where(m.cumsum(0) % 2 == 0, -1, 1).to(torch.int8) for n, m in masks.items()}
        ),
        "sparse": with_tensors(**{"delta/stage2.1.conv2.weight": change * (change > 1.5)}),
        "signs": with_tensors(**{"delta/stage2.1.conv2.weight": snap_signs(change)}),
        "sizes": with_tensors(**{"delta/stage2.1.conv2.weight": snap_sizes(change)}),
        "low-rank": with_tensors(**low),
        "selected": replace(
            probe,
            head=HeadRecord(kind="selected", features=4, outputs=3, taps=(1, 2)),
            tensors={
                "head.weight": torch.randn(3, 4, generator=generator),
                "head.bias": torch.zeros(3),
                "head.selected": torch.arange(4, dtype=torch.int32),
            },
        ),
    }


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for name, patch in make_patches().items():
        (CORPUS / f"{name}.parts").write_bytes(split(encode_patch(patch, compress=False)))
    sparse = (
        torch.rand(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.01
    )  # large enough to be worth coding
    probe = draft_patch(make_tiny())
    coded = replace(probe, tensors={**probe.tensors, "mask/stage1.0.conv2.weight": sparse})
    (CORPUS / "entropy.parts").write_bytes(split(encode_patch(coded)))
    (CORPUS / "whole.safetensors").write_bytes(encode_patch(make_patches()["linear-probe"]))


if __name__ == "__main__":
    main()
