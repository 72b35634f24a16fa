"""The columns of a table that hold pictures, labels and splits, by their usual names and by what stands in them.

Two columns that may both be meant are a question: the error names the option that answers it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelpatch.backbone.preprocessing import is_picture
from modelpatch.data.sources.labels import is_missing
from modelpatch.data.sources.split_names import split_of
from modelpatch.errors import DataError
from modelpatch.text import nearest

IMAGE_NAMES = str.split(
    "image image_path img_path image_file img_file image_filename image_file_name image_location image_filepath image_name "
    "img img_name file_name filename filepath filepaths file_path path paths file files picture picture_path photo pic "
    "images imgs relative_path rel_path full_path src image_id img_id imageid id_code id uuid name key image_url url"
)
LABEL_NAMES = str.split(
    "label labels class classes class_name classname class_label label_name label_text target targets target_name category "
    "categories category_name y ground_truth gt truth fine_label fine_labels coarse_label coarse_labels species breed "
    "diagnosis dx variety cultivar disease finding findings finding_labels emotion expression sentiment genre artist style "
    "scientific_name common_name plant animal tag tags annotation class_id classid class_idx class_index class_num label_id "
    "label_idx label_index label_num target_id category_id choice"
)
SPLIT_NAMES = str.split(
    "split splits set subset partition phase usage data_set dataset data_split split_name mode part"
)
SPLIT_FLAGS = {
    "is_train": "train",
    "is_training": "train",
    "is_training_image": "train",
    "is_test": "test",
    "is_val": "validation",
}
OTHERS = (
    "",
    "index",
    "idx",
    "id",
    "width",
    "height",
    "fold",
    "size",
    "sha256",
    "md5",
    "hash",
    "url",
    "source",
    "license",
)
LOOKED_AT = 200  # cells that show what a column holds
PROBED, NAMED = (
    20,
    0.8,
)  # different cells that are looked for, and the share of them that is found in a column of pictures
MOST_SPLITS = 12  # different values of a column of splits
Cells = Mapping[str, Sequence[Any]]


def fold_column(name: str) -> str:
    """A column's name in lower case with `_` between its words: `ImageId`, `Image ID` and `image-id` are image_id."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+", name)
    return "_".join(words).lower()


def check_column(cells: Cells, name: str | None, option: str, source: str) -> str | None:
    """The column that the user names. Raises `DataError` where there is none of this name."""
    if name is None or name in cells:
        return name
    if len(alike := [one for one in cells if fold_column(one) == fold_column(name)]) == 1:
        return alike[0]
    raise DataError(
        f"{source} has no column {name!r} (--{option}); it has: {list_some(list(cells))}.{nearest(name, cells)}"
    )


def find_by_name(cells: Cells, known: Sequence[str]) -> list[str]:
    """The columns with known names, in the order of these."""
    folded = {name: fold_column(name) for name in cells}
    return [name for one in known for name in cells if folded[name] == one]


def sample_cells(values: Sequence[Any]) -> list[Any]:
    """A few cells of a column that are not empty, spread over it."""
    step = max(len(values) // LOOKED_AT, 1)
    found = [values[row] for row in range(0, len(values), step)]
    return [value for value in found if not is_missing(value)][:LOOKED_AT]


def choose_image(cells: Cells, source: str, find: Callable[[str], Any]) -> str:
    """The column of pictures; `find` returns the file that a cell names. Raises `DataError` for none or several."""
    known = find_by_name(cells, IMAGE_NAMES)
    held = [name for name in (*known, *cells) if any(_is_held(value) for value in sample_cells(cells[name])[:1])]
    if held := list(dict.fromkeys(held)):
        if len(held) > 1 and held[0] not in known:
            raise _ask("pictures", held, "image-column", source)
        return held[0]
    texts = {name: [str(value) for value in sample_cells(cells[name])] for name in cells}
    named = [name for name in cells if texts[name] and sum(map(is_picture, texts[name])) * 2 > len(texts[name])]
    candidates = list(dict.fromkeys([*known, *named])) or find_columns_of_pictures(cells, find)
    if not candidates:
        raise DataError(
            f"{source} has the columns {list_some(list(cells)) or '(none)'}. Expected one of {', '.join(IMAGE_NAMES[:12])} "
            f"... for images and one of {', '.join(LABEL_NAMES[:8])} ... for labels. Name others: --image-column, "
            "--label-column."
        )
    if len(candidates) == 1:
        return candidates[0]
    files = {name: [find(text) for text in texts[name][:20]] for name in candidates}
    shares = {name: sum(file is not None for file in found) / max(len(found), 1) for name, found in files.items()}
    best = [name for name in candidates if shares[name] == max(shares.values()) > 0]
    if not best:
        return next((name for name in candidates if name in named), candidates[0])
    if len({tuple(files[name]) for name in best}) > 1:
        raise _ask("pictures", best, "image-column", source)
    return best[0]


def find_columns_of_pictures(cells: Cells, find: Callable[[str], Any]) -> list[str]:
    """The columns whose first cells name pictures that are there, those of the most; `find` returns the file of a cell."""
    counts = {}
    for name, values in cells.items():
        texts = list(dict.fromkeys(str(value) for value in sample_cells(values)))[:PROBED]
        try:
            files = {find(text) for text in texts} - {None}
        except DataError:  # a name of several pictures
            continue
        if len(files) >= max(2, NAMED * len(texts)):
            counts[name] = len(files)
    return [name for name, count in counts.items() if count == max(counts.values())]


def _is_held(value: Any) -> bool:
    """Return True for a picture in a cell: bytes, or the bytes and path that `datasets` writes."""
    return isinstance(value, bytes) or (isinstance(value, dict) and {"bytes", "path"} & value.keys() != set())


def choose_label(cells: Cells, taken: Sequence[str | None], source: str) -> tuple[str | None, str]:
    """The column of labels, None where no column is called so, and a note about it. Raises `DataError` for several.

    Columns that group the rows alike, as numbers and names of the same classes do, are no question: names are taken.
    """
    rest = {name: values for name, values in cells.items() if name not in taken}
    known = find_by_name(rest, LABEL_NAMES)
    if not known:
        return _only_left(rest)
    if len(known) == 1:
        return known[0], ""
    groups = {name: [str(value) for value in rest[name]] for name in known}
    first = groups[known[0]]
    if not all(_group_alike(first, groups[name]) for name in known[1:]):
        counts = [f"{name} ({len(set(groups[name]))} different)" for name in known]
        raise _ask("labels", known, "label-column", source, counts)
    words = [name for name in known if not all(_is_number(value) for value in groups[name])]
    chosen = (words or known)[0]
    others = ", ".join(name for name in known if name != chosen)
    return chosen, f"the column {chosen} names the classes; {others} groups the rows in the same way"


def _only_left(cells: Cells) -> tuple[str | None, str]:
    """The one other column, where its cells are words that recur: they can be nothing but classes."""
    left = [name for name in cells if fold_column(name) not in OTHERS and not fold_column(name).startswith("unnamed")]
    if len(left) != 1:
        return None, ""
    texts = [value for value in cells[left[0]] if not is_missing(value)]
    words = texts and all(
        isinstance(value, str) and not _is_number(value) and value[:1] not in "[{(" for value in texts
    )
    if not words or len(set(texts)) * 2 > len(texts):
        return None, ""
    return left[0], f"the column {left[0]} is the only one beside the images, and is read as the class of each"


def _group_alike(one: Sequence[str], other: Sequence[str]) -> bool:
    pairs = set(zip(one, other, strict=True))
    return len(pairs) == len(set(one)) == len(set(other))


def choose_split(cells: Cells, taken: Sequence[str | None], source: str, named: str | None) -> dict[int, str] | None:
    """The split of every row, by number, that a column gives; empty cells are of no split. None where no column does.

    Raises `DataError` for the column `split`, or one that the user named, with a value that is no split's name.
    """
    for name in [named] if named else find_by_name(cells, SPLIT_NAMES):
        values = (
            {} if name in taken else {row: str(v).strip() for row, v in enumerate(cells[name]) if not is_missing(v)}
        )
        different = set(values.values())
        wrong = {value for value in different if split_of(value) is None}
        if values and not wrong and len(different) <= MOST_SPLITS:
            return {row: str(split_of(value)) for row, value in values.items()}
        if wrong and name not in taken and (named or fold_column(name) == "split"):
            row = min(row for row, value in values.items() if value in wrong)
            raise DataError(
                f"{source}, row {row + 1}: split {values[row][:80]!r} is none of train, test, validation or their usual other "
                "names."
            )
    for name, split in SPLIT_FLAGS.items():
        for column in [] if named else find_by_name(cells, [name]):
            other = "train" if split != "train" else "test"
            texts = [str(value).strip().lower() for value in cells[column]]
            if set(texts) <= {"0", "1", "true", "false", "yes", "no"}:
                return {row: split if text in ("1", "true", "yes") else other for row, text in enumerate(texts)}
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ask(thing: str, columns: Sequence[str], option: str, source: str, shown: Sequence[str] | None = None) -> DataError:
    return DataError(
        f"{source} has several columns of {thing}: {list_some(shown or columns)}. Name one: --{option} '{columns[0]}' "
        f"({option.replace('-', '_')}=...)."
    )


def list_some(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most])[:400] + (f" and {len(names) - most} more" if len(names) > most else "")
