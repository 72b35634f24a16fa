"""The operations of a network in words, segment by segment: `conv1 convolution stride=2 padding=3`.

They are read where torch runs them (`TorchDispatchMode`), below all modules: the same network of timm, torchvision or
transformers, with modules or functions, in place or not, gives the same lines, as far as it runs the same operations. Left out
are layouts of memory, random layers that are off and numbers that tensors imply (channels, kernels). A line begins with the
name of the tensors it reads, relative to the segment (`-`: none).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modelpatch.backbone.chain import Chain
from modelpatch.text import Text

MOST = 4096  # lines, kinds or segments of a description
MOST_ALIGNED = 64  # lines of a segment that are aligned with others: a file may state any number
NAMED = 3  # differences that are told
LAYOUT = frozenset({
    "view", "unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "split",
    "split_with_sizes", "unsafe_split", "chunk", "unbind", "squeeze", "unsqueeze", "clone", "detach", "alias",
    "to_copy", "copy", "contiguous", "empty", "empty_like", "empty_strided", "new_empty", "new_zeros",
    "new_ones", "zeros", "ones", "zeros_like", "ones_like", "full", "full_like", "arange", "linspace",
    "scalar_tensor", "lift_fresh", "as_strided", "local_scalar_dense", "item", "flatten", "is_same_size",
    "sym_size", "dropout", "resize", "fill", "set_", "movedim",
})  # fmt: skip
ALIASES = {
    "addmm": "linear",
    "mm": "linear",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "max_pool2d_with_indices": "max_pool2d",
}
NUMBERS: dict[str, tuple[str, ...]] = {  # those that matter; of other operations, all single ones
    "convolution": ("stride", "padding", "dilation", "groups"),
    "batch_norm": ("eps",),
    "layer_norm": ("eps",),
    "group_norm": ("group", "eps"),
    "linear": (),
    "matmul": (),
    "mean": ("dim",),
    "sum": ("dim",),
    "cat": ("dim",),
    "softmax": ("dim",),
    "attention": ("heads", "is_causal", "scale"),
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "adaptive_avg_pool2d": ("output_size",),
    "adaptive_max_pool2d": ("output_size",),
    "constant_pad_nd": ("pad", "value"),
    "roll": ("shifts",),
}
Index = Annotated[int, Field(ge=0, lt=MOST)]
Kind = Annotated[tuple[Index, ...], Field(max_length=2 * MOST)]


class Description(BaseModel, frozen=True, extra="forbid"):
    """The operations of every segment: `segments` are numbers of `kinds`, these of `lines`; equal blocks stand once."""

    lines: Annotated[tuple[Text, ...], Field(max_length=MOST)]
    kinds: Annotated[tuple[Kind, ...], Field(max_length=MOST)]
    segments: Annotated[tuple[Index, ...], Field(max_length=MOST)]

    @model_validator(mode="after")
    def _within(self) -> Self:
        found = max((index for kind in self.kinds for index in kind), default=-1)
        if found >= len(self.lines) or max(self.segments, default=-1) >= len(self.kinds):
            raise ValueError("a description names a line or kind that it does not have")
        return self

    @classmethod
    @torch.no_grad()
    def of(cls, chain: Chain, example: Tensor) -> Self:
        """The description of a chain, found by running it on an image (1, C, H, W)."""
        x, lines, kinds, segments = example, dict[str, int](), dict[tuple[int, ...], int](), list[int]()
        chain.prepare(example)
        for segment in (one.in_eval_mode() for one in chain):
            names = {tensor.data_ptr(): name for name, tensor in segment.named_tensors() if tensor.numel()}
            with Recorder(names, segment.name) as recorder:
                x = segment.module(x)
            kind = tuple(lines.setdefault(line, len(lines)) for line in recorder.lines)
            segments.append(kinds.setdefault(tuple(index for index in kind if index < MOST)[: 2 * MOST], len(kinds)))
        return cls(lines=tuple(lines)[:MOST], kinds=tuple(kinds)[:MOST], segments=tuple(segments[:MOST]))

    def segment(self, index: int) -> list[str]:
        """The lines of a segment."""
        return [self.lines[line] for line in self.kinds[self.segments[index]]]

    def differences(self, other: Self, names: Sequence[str]) -> list[str]:
        """The differences in words, this description's side first: `padding of conv_stem: 1 against same`.

        `names` are those of the segments. Empty for descriptions with another number of segments.
        """
        if not len(self.segments) == len(other.segments) == len(names):
            return []
        found = [
            difference
            for index, name in enumerate(names)
            for difference in _differences(self.segment(index), other.segment(index), name)
        ]
        return list(dict.fromkeys(found))


def tell(differences: Sequence[str]) -> str:
    """The first differences, and how many more there are."""
    more = len(differences) - NAMED
    return "; ".join(differences[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _differences(ours: list[str], theirs: list[str], segment: str) -> list[str]:
    """The differences of two segments. Where many lines differ and their numbers too, only these are told."""
    ends = _common(ours, theirs)
    most = min(len(ours), len(theirs)) - ends
    tail = min(_common(ours[::-1], theirs[::-1]), most)
    mine, his = ours[ends : len(ours) - tail], theirs[ends : len(theirs) - tail]
    if len(mine) == len(his):
        return _in_pairs(mine, his, ours[:ends], segment)
    if mine and his and max(len(mine), len(his)) > MOST_ALIGNED:
        where = _place([*ours[:ends], *mine[:1]], segment)
        return [f"{where}: {len(mine):,} operations against {len(his):,}"]
    found: list[str] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, mine, his, autojunk=False).get_opcodes():
        before, after, above = mine[i:j], his[k:m], [*ours[:ends], *mine[:i]]
        if tag != "equal" and len(before) == len(after):
            found += _in_pairs(before, after, above, segment)
        elif tag != "equal":
            told = f"{_short(before)} against {_short(after)}"
            told = told if before and after else f"{_short(before or after)} is {'left out' if before else 'added'}"
            found.append(f"{_place([*above, *before[:1]], segment)}: {told}")
    return found


def _in_pairs(ours: list[str], theirs: list[str], above: list[str], segment: str) -> list[str]:
    """The differences of as many lines, each of which stands for the other's; `above` are the lines before."""
    found: list[str] = []
    last = next((line for line in reversed(above) if _is_placed(line)), "")
    for mine, his in zip(ours, theirs, strict=True):
        last = mine if _is_placed(mine) else last
        found += _changed(mine, his, _place([last] if last else [], segment)) if mine != his else []
    return found


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The number of equal lines at the beginning."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((number for number, (mine, his) in pairs if mine != his), min(len(ours), len(theirs)))


def _changed(ours: str, theirs: str, where: str) -> list[str]:
    """The differences of two lines that stand for each other."""
    (place, name, mine), (_, other, his) = _words(ours), _words(theirs)
    if name != other:
        return [f"{_short([ours])} against {_short([theirs])} {'in' if place != '-' else 'after'} {where}"]
    keys = [key for key in {**mine, **his} if mine.get(key) != his.get(key)]
    what = name if place == "-" else ""
    return [f"{key} of {f'{what} after ' * bool(what)}{where}: {mine.get(key)} against {his.get(key)}" for key in keys]


def _words(line: str) -> tuple[str, str, dict[str, str]]:
    """The place, the name and the numbers of a line; of a line that was written otherwise, as far as it goes."""
    place, _, rest = line.partition(" ")
    name, *numbers = rest.split(" ")
    return place, name, {key: value for key, _, value in (pair.partition("=") for pair in numbers)}


def _short(lines: Sequence[str]) -> str:
    words = [" ".join(line.split(" ")[1:]) for line in lines]
    return ", ".join(words[:NAMED]) + (", ..." if len(words) > NAMED else "")


def _is_placed(line: str) -> bool:
    """Return True for a line of an operation that reads tensors."""
    return not line.startswith("- ")


def _place(lines: Sequence[str], segment: str) -> str:
    """The backbone's name for the last operation that reads tensors."""
    named = [line.split(" ")[0] for line in lines if _is_placed(line)]
    if not named or named[-1] == ".":
        return segment
    return named[-1].removeprefix("/") if named[-1].startswith("/") else f"{segment}.{named[-1]}"


class Recorder(TorchDispatchMode):
    """A context that writes a line for every operation that torch runs. `names` are those of tensors by their addresses."""

    def __init__(self, names: Mapping[int, str], segment: str) -> None:
        super().__init__()
        self.names, self.segment = names, segment
        self.lines: list[str] = []
        self._padded: tuple[int, tuple[int, ...]] | None = (
            None  # where the result of the last padding lies, and its sides
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _plain(func.overloadpacket.__name__)
        if name not in LAYOUT:
            arguments = func._schema.arguments
            given = {one.name: one.default_value for one in arguments if one.has_default_value()}
            given |= {one.name: value for one, value in zip(arguments, args, strict=False)} | (kwargs or {})
            self._write(name, given, result)
        return result

    def _write(self, name: str, given: dict[str, Any], result: Any) -> None:
        read: Any = given.get("self", given.get("input"))
        kept = (
            NUMBERS.get(name)
            if name in NUMBERS
            else tuple(k for k, v in given.items() if isinstance(v, int | float | str))
        )
        if name == "attention" and isinstance(given.get("query"), Tensor):
            given = {**given, "heads": given["query"].shape[-3]}
        numbers = {key: _number(key, given[key], read) for key in kept or () if given.get(key) is not None}
        if name == "convolution" and self._padded is not None and self._padded[0] == read.data_ptr():
            self.lines.pop()
            numbers["padding"] = _joined(self._padded[1], given, read)
        self._padded = None
        if name == "constant_pad_nd" and not given.get("value") and len(given["pad"]) == 4:
            self._padded = result.data_ptr(), tuple(given["pad"])
        self.lines.append(" ".join([self._place(given), name, *(f"{key}={value}" for key, value in numbers.items())]))

    def _place(self, given: Mapping[str, Any]) -> str:
        for value in given.values():
            if isinstance(value, Tensor) and (full := self.names.get(value.data_ptr())):
                owner = full.rpartition(".")[0] or full
                if owner == self.segment:
                    return "."
                inner = owner.removeprefix(f"{self.segment}.")
                return inner if inner != owner else f"/{owner}"
        return "-"


def _plain(name: str) -> str:
    """An operation's name without its library, and without a word for in place."""
    name = re.sub(r"^(native|cudnn|miopen|mkldnn|thnn)_", "", name.strip("_"))
    if name.startswith("scaled_dot_product"):
        return "attention"
    return "batch_norm" if "batch_norm" in name else ALIASES.get(name, name)


def _number(key: str, value: Any, read: Any) -> str:
    if key == "dim" and isinstance(read, Tensor):
        dims = value if isinstance(value, list | tuple) else [value]
        value = sorted(dim % max(read.ndim, 1) for dim in dims)
    if isinstance(value, list | tuple):
        return str(value[0]) if len(set(value)) == 1 else ",".join(map(str, value))
    return str(value).replace(" ", "_")


def _joined(pad: tuple[int, ...], given: Mapping[str, Any], padded: Tensor) -> str:
    """The padding of a convolution and of what was padded before it: a number, left,right,top,bottom, or `same`."""
    high, wide = (*given["padding"], *given["padding"])[:2] if len(given["padding"]) == 1 else given["padding"]
    left, right, top, bottom = pad[0] + wide, pad[1] + wide, pad[2] + high, pad[3] + high
    if left == right == top == bottom:
        return str(left)
    if left == right and top == bottom:
        return f"{top},{left}"
    kernel, sides = given["weight"].shape[2:], (padded.shape[-2] - pad[2] - pad[3], padded.shape[-1] - pad[0] - pad[1])
    needed = [
        max((-(-side // stride) - 1) * stride + (size - 1) * dilation + 1 - side, 0)
        for side, stride, size, dilation in zip(sides, given["stride"], kernel, given["dilation"], strict=True)
    ]
    if (top, bottom, left, right) == tuple(part for total in needed for part in (total // 2, total - total // 2)):
        return "same"
    return f"{left},{right},{top},{bottom}"
