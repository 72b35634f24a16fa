"""scikit-learn's 1,797 real 8 x 8 images of handwritten digits: `bundled:digits`."""

from typing import Any

import numpy as np

from modelpatch.data.sources import base
from modelpatch.data.splits import Split
from modelpatch.errors import require
from modelpatch.tasks.classification import Classification


@base.register_source("digits")
class Digits(base.DataSource):
    """The digits that scikit-learn brings."""

    kind = Classification.name

    def accepts(self, source: Any) -> bool:
        return isinstance(source, str) and source == "bundled:digits"

    def read(self, source: Any, options: base.SourceOptions) -> base.Found:
        bunch = require("sklearn.datasets", "demo", "Loading bundled:digits", "scikit-learn").load_digits()
        images = np.round(bunch.images / 16 * 255).astype(np.uint8)
        split = Split(list(images), bunch.target.astype(np.int64))
        return base.Found(Classification.name, {"train": split}, [str(digit) for digit in range(10)])
