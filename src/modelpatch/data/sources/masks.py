"""Images with masks: folders of both, for each split or alone, or pairs in one folder.

Names of classes are listed in `classes.txt` or `labels.txt`, one a line, in a legend of colours or values, or are given.
"""

from pathlib import Path
from typing import Any

from modelpatch.data.sources.base import DataSource, Found, SourceOptions, only_folder, register_source
from modelpatch.data.sources.finding import folders_of_splits
from modelpatch.data.sources.legends import find_legend
from modelpatch.data.sources.pairing import find_alike, has_folders, has_pairs, pair_up
from modelpatch.data.sources.remarks import Remarks
from modelpatch.data.sources.values import make_segmentation
from modelpatch.tasks.segmentation import Segmentation

LISTS = "ImageSets/Segmentation"  # of Pascal VOC, whose source reads them


@register_source("masks")
class MaskFolders(DataSource):
    """Images beside masks, in folders of their own or in one."""

    kind = Segmentation.name

    def accepts(self, source: Any) -> bool:
        path = Path(source)
        if not path.is_dir() or (path / LISTS).is_dir():
            return False
        named = has_folders(path) or any(map(has_pairs, [path, *_split_folders(path)]))
        return named or (only_folder(path) is None and bool(find_alike(path)))

    def read(self, source: Any, options: SourceOptions) -> Found:
        path, remarks = Path(source), Remarks()
        found = pair_up(path, remarks)
        pairs = {split: (found.images[split], found.masks[split]) for split in found.images}
        legend = find_legend([path, *sorted({file.parent for own in found.masks.values() for file in own})])
        names = options.class_names(path) if legend is None else options.names
        return make_segmentation(pairs, options, names, str(path), remarks, legend)


def _split_folders(path: Path) -> list[Path]:
    return [folder for own in folders_of_splits(path).values() for folder in own]
