"""`bundled:digits`: scikit-learn's 1,797 real 8 x 8 images of handwritten digits."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelpatch.data.sources.base import DataSource, Found, SourceOptions, register_source
from modelpatch.data.splits import Split
from modelpatch.errors import MissingExtraError
from modelpatch.tasks.classification import Classification


@register_source("digits")
class Digits(DataSource):
    """The digits that scikit-learn brings."""

    kind = Classification.name

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str) and source == "bundled:digits"

    def read(self, source: Any, options: SourceOptions) -> Found:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingExtraError("scikit-learn", "demo", "Loading bundled:digits") from None
        bunch = load_digits()
        images = np.round(bunch.images / 16 * 255).astype(np.uint8)
        split = Split(list(images), bunch.target.astype(np.int64))
        return Found(Classification.name, {"train": split}, [str(digit) for digit in range(10)])
