"""Linear probes beside scikit-learn's logistic regression, and what both take.

    ours      `linear-probe`: features of plain and augmented images, the penalty chosen on a fifth of the training images
    steps     `linear-probe(solver=steps)`: the same head trained by steps for the epochs of a fit
    sklearn   standardised features of the same plain images; C chosen on a fifth, then fitted on all of them

    python benchmarks/probes.py --json benchmarks/results/probes.json

MobileNetV2, 96 px. A run goes on where its file ends; `--sets` measures some. Seconds of scikit-learn are without features.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import modelpatch as mp
from common import SETS, Rows, mobilenet, timed, unpack
from modelpatch.train.fitting import Fit
from modelpatch.train.settings import FitSettings

PIXELS, HELD_OUT = 96, 0.2
STRENGTHS = tuple(float(10.0**power) for power in np.arange(-4.0, 2.0, 0.5))  # C for 1,000 images
Examples = tuple[np.ndarray, np.ndarray]


def read_features(backbone: mp.Backbone, task: mp.Task) -> dict[str, Examples]:
    """The features and labels of both splits, as every fit reads them."""
    fit = Fit(backbone, task, mp.methods.LinearProbe(), FitSettings(image_size=PIXELS, augment="none"))
    model, found = fit.build(), {}
    for split in ("train", "test"):
        inputs: Any = fit.source.inputs(model, split, augmented=False)
        found[split] = inputs.values[0].flatten(1).numpy(), inputs.labels[0].numpy()
    return found


def regress(x: np.ndarray, y: np.ndarray, seed: int) -> LogisticRegression:
    """Logistic regression on all images, with the C that has the least log loss on a held-out share."""
    kept, held = train_test_split(np.arange(len(y)), test_size=HELD_OUT, stratify=y, random_state=seed)
    found: dict[float, float] = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength * 1000 / len(kept), max_iter=300).fit(x[kept], y[kept])
        chances = model.predict_proba(x[held])[np.arange(len(held)), np.searchsorted(model.classes_, y[held])]
        found[strength] = float(-np.log(np.maximum(chances, 1e-12)).mean())
    best = min(found, key=lambda strength: found[strength])
    return LogisticRegression(C=best * 1000 / len(y), max_iter=2000).fit(x, y)


def measure(backbone: mp.Backbone, name: str, cache: Path, seed: int) -> dict[str, float]:
    """Both sides of one set: accuracies in percent, and seconds."""
    task = mp.load_task(unpack(name, cache))
    figures: dict[str, float] = {}
    for side, method in {"ours": "linear-probe", "steps": "linear-probe(solver=steps)"}.items():
        patch, seconds = timed(partial(mp.fit, backbone, task, method, image_size=PIXELS, seed=seed))
        figures |= {side: 100 * patch.metrics["test_top1"], f"{side}_s": seconds}
    found = read_features(backbone, task)
    scaler = StandardScaler().fit(found["train"][0])
    x, y = found["train"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a C too weak to converge
        model, seconds = timed(lambda: regress(scaler.transform(x), y, seed))
    figures |= {
        "sklearn": 100 * float(model.score(scaler.transform(found["test"][0]), found["test"][1])),
        "sklearn_s": seconds,
    }
    return {**figures, "ours_less_sklearn": figures["ours"] - figures["sklearn"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpatch-benchmarks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(exist_ok=True)
    backbone, rows = mp.load_backbone(mobilenet()), Rows(arguments.json)
    for name in arguments.sets:
        rows.add(f"{name}, seed {arguments.seed}", partial(measure, backbone, name, arguments.cache, arguments.seed))
    rows.report(f"linear probes, {PIXELS} px: accuracies and seconds")


if __name__ == "__main__":
    main()
