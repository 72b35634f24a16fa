"""Damage patches at random and bind them, as a server does with what strangers publish: no raw error, none takes a second.

    PYTHONPATH=tests:tests/fuzz python benchmarks/fuzz_binding.py --count 100000 --state counts.json

The seeds are those of `tests/fuzz` and one patch of every method and head, each as the parts of its file; a case changes
values of the header, the table of tensors, or bytes, and the file is made whole again around it. What is read is bound in both
ways, to an engine's templates and as a module, and answers an image: both take it or both refuse it. One case in fifty changes
name and arguments of the backbone and looks for it. `fuzzing.py` says how cases are numbered, continued and repeated.
"""

import json
import random
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from patch_parser import CORPUS, LINE, VALUES, assemble, mutate, split
from pydantic import ValidationError

import fuzzing
from conftest import draft_patch, make_tiny
from modelpatch import methods
from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.files import check_arguments
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.engine.engine import Engine
from modelpatch.errors import ModelpatchError, PatchFileError
from modelpatch.heads.base import HEADS
from modelpatch.patch.blueprint import GRAFTS
from modelpatch.patch.contents import Patch, decode_patch, encode_patch
from modelpatch.patch.file import BackboneRecord
from modelpatch.patch.finding import find_backbone
from modelpatch.serve.patch_cache import load
from modelpatch.tasks.kind import KINDS
from modelpatch.tasks.record import TaskRecord

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
NAMES = ("timm:test_vit", "timm:test_resnet", "timm:test_efficientnet", "torchvision:resnet18", "bundled:tiny")
ARGUMENTS = (
    "depth",
    "embed_dim",
    "num_classes",
    "img_size",
    "layers",
    "channels",
    "drop_rate",
    "output_stride",
    "in_chans",
)
ODD: list[Any] = [*VALUES, 7, 64, 1024, 2**20, [2, 2], [2**20, 2], [2] * 64, "silu", "same", 1e-5]
MOST_NUMBERS = 10**6  # that masks unfold to
REBUILT = 50  # one case of so many looks for another backbone
KEPT = 0.9  # of the cases keep the backbone's record: otherwise nearly all would end at its hash


def make_seeds(backbone: Backbone) -> list[bytes]:
    """The parts of one patch of every method and every head that a backbone takes."""
    made = list[Patch]()
    for name in methods.METHODS.names():
        try:
            made.append(draft_patch(backbone, methods.make_method(name)))
        except ModelpatchError:  # not for this network, or without its library
            continue
    classes = tuple(f"class {number}" for number in range(3))
    for name in KINDS.names():
        kind = KINDS.find(name)
        for decoder in kind.decoders or (None,):
            try:
                head = kind.make_head(backbone, len(classes), backbone.input_size[1], decoder)
                model = methods.LinearProbe().draft(backbone, len(classes), head)
                made.append(model.to_patch(TaskRecord(name=name, classes=classes, kind=name)))
            except (ModelpatchError, ValidationError):
                continue
    return [split(encode_patch(patch, compress=False)) for patch in made]


class Target:
    """A backbone with the patches that are damaged for it."""

    def __init__(self, backbone: Backbone, seeds: list[bytes]) -> None:
        self.backbone, self.seeds = backbone, seeds
        self.templates = Engine(backbone).templates
        self.image = torch.rand(1, *backbone.input_size, generator=torch.Generator().manual_seed(0))

    def damage(self, chance: random.Random) -> bytes:
        """A damaged patch file, whole again, and mostly still of this backbone."""
        seed = chance.choice(self.seeds)
        data = seed
        for _ in range(chance.choice((1, 1, 1, 2))):
            data = chance.choice((mutate, change_parts, change_parts))(data, chance)
        if chance.random() < KEPT:
            data = keep_backbone(data, seed)
        return assemble(data) or data

    def bind(self, data: bytes) -> str:
        """Bind a file in both ways. Raises AssertionError where one takes what the other refuses."""
        refusals = list[ModelpatchError]()
        try:
            patch = decode_patch(data, "the input", most=MOST_NUMBERS)
        except PatchFileError:
            return "not read"
        for way in (self._as_server, self._as_module):
            try:
                way(data, patch)
            except ModelpatchError as error:
                refusals.append(error)
        trial = "not finite" in str(refusals[0]) if refusals else False  # which the server alone looks at
        if len(refusals) == 1 and not trial:
            raise AssertionError(f"one of the two ways refuses it: {refusals[0]!r}")
        return f"refused: {type(refusals[0]).__name__}" if refusals else "bound"

    def _as_server(self, data: bytes, patch: Patch) -> None:
        load(self.templates, data)

    def _as_module(self, data: bytes, patch: Patch) -> None:
        model = self.backbone.patched(patch).eval()
        side = patch.preprocessing.image_size
        with torch.inference_mode():
            model(self.image.new_zeros(1, self.image.shape[1], side, side))


def change_parts(data: bytes, chance: random.Random) -> bytes:
    """The parts with one thing changed that decides what is bound: a module, a tensor's name or shape, the head."""
    table, header, payload = data.split(LINE, 2)
    try:
        tensors, described = json.loads(table), json.loads(header)
        change = chance.choice(CHANGES)
        payload = change(tensors, described, payload, chance)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # of parts that were damaged before
        return data
    return LINE.join([json.dumps(tensors).encode(), json.dumps(described).encode(), payload])


def change_module(tensors: Any, described: Any, payload: bytes, chance: random.Random) -> bytes:
    """Another argument, place or kind of an added module, or the module once more."""
    graft = chance.choice(described["grafts"])
    way = chance.randrange(4)
    if way == 0:
        graft[chance.choice(("start", "end"))] += chance.choice((-1, 1, 2, 100))
    elif way == 1:
        described["grafts"].append(json.loads(json.dumps(graft)))
    elif way == 2:
        graft["kind"] = chance.choice(GRAFTS.names())
    else:
        holder = graft["arguments"]
        key = chance.choice(list(holder))
        while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.8:
            holder = holder[key]
            key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        holder[key] = chance.choice(ODD)
    return payload


def rename(tensors: Any, described: Any, payload: bytes, chance: random.Random) -> bytes:
    """A tensor under the name or the way of another."""
    old, other = chance.choice(list(described["codecs"])), chance.choice(list(described["codecs"]))
    way = chance.choice(("replace", "mask", "delta", "left", "right"))
    new = other if chance.random() < 0.3 else f"{way}/{old.partition('/')[2] or 'fc.weight'}"
    described["codecs"][new] = described["codecs"].pop(old)
    for name in [name for name in tensors if name.endswith(old)]:
        tensors[name.removesuffix(old) + new] = tensors.pop(name)
    return payload


def reshape(tensors: Any, described: Any, payload: bytes, chance: random.Random) -> bytes:
    """A tensor with its sides in another order, or of another size, whose bytes are there."""
    entry = tensors[chance.choice(list(tensors))]
    shape = entry["shape"]
    if chance.random() < 0.5 or not shape:
        entry["shape"] = chance.choice((shape[::-1], [*shape, 1], [1, *shape], [*shape[:-2], shape[-2] * shape[-1]]))
        return payload
    side = chance.randrange(len(shape))
    grown = [*shape[:side], 2 * shape[side], *shape[side + 1 :]]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["shape"] = grown
    entry["data_offsets"] = [len(payload), len(payload) + 2 * size]
    start = max(end for one in tensors.values() for end in [one["data_offsets"][1]])
    return payload + bytes(2 * size) if start == len(payload) + 2 * size else payload


def change_head(tensors: Any, described: Any, payload: bytes, chance: random.Random) -> bytes:
    """Another head, task, preprocessing or strength."""
    holder = described[chance.choice(("head", "head", "task", "preprocessing"))]
    key = chance.choice(list(holder))
    while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.7:
        holder = holder[key]
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    holder[key] = chance.choice((*ODD, *HEADS.names(), *KINDS.names(), 16, 32, 48, 3))
    return payload


def set_values(tensors: Any, described: Any, payload: bytes, chance: random.Random) -> bytes:
    """Numbers of any size and sign in the place of a tensor's."""
    start, end = tensors[chance.choice(list(tensors))]["data_offsets"]
    return payload[:start] + chance.randbytes(1) * (end - start) + payload[end:]


CHANGES: tuple[Callable[[Any, Any, bytes, random.Random], bytes], ...] = (
    change_module,
    change_module,
    rename,
    reshape,
    change_head,
    set_values,
)


def keep_backbone(data: bytes, seed: bytes) -> bytes:
    """The parts of a damaged file with the backbone's record as it was."""
    parts, whole = data.split(LINE, 2), json.loads(seed.split(LINE, 2)[1])
    try:
        header = json.loads(parts[1])
        header["backbone"] = whole["backbone"]
        parts[1] = json.dumps(header).encode()
    except (ValueError, IndexError, TypeError, RecursionError):
        return data
    return LINE.join(parts)


def rebuild(record: BackboneRecord, chance: random.Random) -> str:
    """Look for a network of a zoo with odd arguments, as a patch of it would have it done."""
    arguments = {name: chance.choice(ODD) for name in chance.sample(ARGUMENTS, chance.randint(0, 3))}
    try:
        given = check_arguments(arguments)
    except ValueError:
        return "refused"
    changed = record.model_copy(
        update={"spec": chance.choice(NAMES), "arguments": {**given, "pretrained": False}, "weights": None}
    )
    find_backbone(changed)
    return "built"


def main() -> None:
    given = fuzzing.options(__doc__, 100_000).parse_args()
    seen = Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    tiny, vit = make_tiny(), load_backbone("timm:vit_tiny_patch16_224", pretrained=False, preprocessing=seen, **VIT)
    corpus = [path.read_bytes() for path in sorted(CORPUS.glob("*.parts"))]
    targets = [Target(tiny, [*corpus, *make_seeds(tiny)]), Target(vit, make_seeds(vit))]
    record = BackboneRecord.of(tiny)

    def prepare(number: int) -> fuzzing.Case:
        chance = random.Random(number)
        if number >= 0 and number % REBUILT == 0:
            return partial(rebuild, record, chance)
        target = chance.choice(targets)
        data = target.damage(chance) if number >= 0 else assemble(target.seeds[0])
        return partial(target.bind, data or b"")

    try:
        fuzzing.run(prepare, given)
    finally:
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:,} MB")


if __name__ == "__main__":
    main()
