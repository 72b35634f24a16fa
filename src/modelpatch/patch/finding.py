"""The backbone of a patch, found on this machine: a patch names it without any folder.

Files are looked for beside the patch, in the folders of `MODELPATCH_BACKBONES`, in the place that a backbone with the same
hash was last loaded from, and in the working folder; what a zoo or hub publishes is loaded by its name. A file counts only if
its chain has the patch's hash.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpatch.backbone.backbone import Backbone
from modelpatch.backbone.load import load_backbone
from modelpatch.backbone.places import SEARCHED, LocalPlace, recall, searched_folders
from modelpatch.errors import BackboneError, UnknownBackboneError
from modelpatch.patch.contents import Patch
from modelpatch.patch.file import MODULE, BackboneRecord


@dataclass(frozen=True)
class LookedAt:
    """A place to look at, in words that an error quotes, and what to load there; None if nothing is there."""

    where: str
    place: LocalPlace | None = None


def find_backbone(
    patch: Patch | BackboneRecord, beside: str | Path | None = None, arguments: Mapping[str, Any] | None = None
) -> Backbone:
    """The backbone that a patch was made for, loaded from wherever this machine has it.

    `beside` is the patch's file or folder, `arguments` override those that the patch records. Raises `UnknownBackboneError`
    that says where was looked, `BackboneError` for a backbone that is there but cannot be loaded.
    """
    record = patch.backbone if isinstance(patch, Patch) else patch
    looked = list[str]()
    for candidate in candidates(record, beside):
        if candidate.place is None:
            looked.append(f"{candidate.where}: not there")
            continue
        place = replace_arguments(candidate.place, arguments)
        try:
            found = load_backbone(place.spec, **place.options)
        except BackboneError as error:
            if not record.is_local:
                raise
            looked.append(f"{candidate.where}: {error}")
            continue
        if found.fingerprints.chain == record.fingerprint.chain or not record.is_local:
            return found  # of a published network the caller says what differs
        looked.append(f"{candidate.where}: other weights (chain {found.fingerprints.chain[:12]})")
    raise UnknownBackboneError(_tell(record, beside, looked), _advise(record))


def replace_arguments(place: LocalPlace, arguments: Mapping[str, Any] | None) -> LocalPlace:
    """The place with some arguments of the constructor overridden."""
    return place.model_copy(update={"arguments": {**place.arguments, **(arguments or {})}})


def candidates(record: BackboneRecord, beside: str | Path | None) -> Iterator[LookedAt]:
    """The places where a backbone may be, in the order in which they are tried."""
    known = recall(record.fingerprint.chain)
    kind, _, name = record.spec.partition(":")
    if record.is_local:
        wanted = record.weights or name
        for label, folder in _folders(beside):
            path = folder / wanted
            yield LookedAt(f"{label} {path}", _place(record, path) if path.exists() else None)
        if known is not None:
            yield LookedAt(f"where it was loaded from, {known}", known)
        else:
            yield LookedAt("a place that it was loaded from on this machine")
        for label, folder in _folders(None):
            for path in sorted(folder.glob("*.safetensors")) if kind == "file" and folder != Path.cwd() else ():
                if path.name != wanted:
                    yield LookedAt(f"{label} {path}", _place(record, path))
    elif known is not None and kind != MODULE:
        yield LookedAt(f"where it was loaded from, {known}", known)
    elif kind != MODULE and record.hub is None:
        yield LookedAt(record.spec, LocalPlace(spec=record.spec, arguments=record.arguments))


def _folders(beside: str | Path | None) -> Iterator[tuple[str, Path]]:
    if beside is not None:
        path = Path(beside)
        yield "beside the patch,", path if path.is_dir() else path.parent
    for folder in searched_folders():
        yield f"in {SEARCHED},", folder
    yield "in the working folder,", Path.cwd()


def _place(record: BackboneRecord, path: Path) -> LocalPlace:
    kind, _, _ = record.spec.partition(":")
    if record.weights is not None:
        return LocalPlace(spec=record.spec, arguments=record.arguments, weights=str(path))
    return LocalPlace(spec=f"{kind}:{path}", arguments=record.arguments)


def _tell(record: BackboneRecord, beside: str | Path | None, looked: list[str]) -> str:
    kind, _, name = record.spec.partition(":")
    patch = "the patch" if beside is None else str(beside)
    if kind == MODULE:
        return f"{patch} was made for a module ({name}) that only your own code can build."
    if not looked and record.hub is not None:
        return f"{patch} asks for a network of the hub, where anybody may have put it: {record.hub}."
    what = f"the weights {record.weights} of {record.spec}" if record.weights else f"the backbone file {name}"
    unset = "" if searched_folders() else f"; {SEARCHED} names no folders"
    return f"{patch} needs {what}. Looked {'; '.join(looked)}{unset}."


def _advise(record: BackboneRecord) -> str:
    kind, _, name = record.spec.partition(":")
    if kind == MODULE:
        return "Use Python: mp.load_backbone(module).patched(mp.Patch.load(path))."
    if record.weights is not None:
        return f"Name it: --backbone {record.spec} --weights PATH/{record.weights}, or set {SEARCHED}=FOLDER."
    if record.hub is not None:
        return f"If you trust it: --backbone {record.spec}"
    return f"Name it: --backbone {kind}:PATH/{name}, or set {SEARCHED}=FOLDER."
