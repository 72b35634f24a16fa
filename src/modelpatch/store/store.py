"""A store: patches by name, version and tag, in a folder or a place that `fsspec` reaches.

Versions are named by their content and never change; tags are small files that are replaced whole. A version is published as
its bytes, then its record, then its tags, so a reader sees the old version or the new one, and writers need no lock. After a
removal the tags are read again, and after setting a tag the version: of two writers that meet, one repairs the store.
"""

import difflib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from modelpatch.errors import (
    DamagedPatchError,
    MissingExtraError,
    ModelpatchError,
    NotAPatchError,
    OtherBackboneError,
    PatchError,
    StoreError,
    TaggedVersionError,
    UnknownPatchError,
)
from modelpatch.patch.contents import Patch, decode_patch, encode_patch, read_patch_file
from modelpatch.patch.envelope import Signature, read_beside
from modelpatch.patch.signing import Signers
from modelpatch.store.files import (
    FILE,
    INDEX,
    PATCHES,
    RECORD,
    SIGNATURE,
    TAG,
    Index,
    is_temporary,
    is_whole,
    path_of,
    with_tags,
)
from modelpatch.store.storage import open_storage
from modelpatch.store.version import HASH, LATEST, NAME, PREFIX, Version, check_name, check_tag, parse_reference

TRIES, PAUSE = 10, 0.01  # the pause, in seconds, grows with every try
NEAR = 2000  # names that are compared with an unknown one
PUBLISH = "Publish the patch again."


@dataclass(frozen=True)
class Fault:
    """A fault in a store that would make an answer wrong: the place, and what to do."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


Versions = list[Version]  # `list` is one of the store's own words
Faults = list[Fault]


class Store:
    """Patches by name and version under a folder or URL: `Store("patches/")`, `Store("s3://bucket/patches")`.

    `storage_options` go to `fsspec`. Any number of threads and processes, on any number of machines, may read and write one
    store at the same time. Names of patches and tags match `[a-z0-9][a-z0-9._-]{0,63}`. Every method raises `StoreError`
    where the place cannot be read or written, and `InvalidReferenceError` for a name that is none. `url` is that place.

    With `signers` only what they have signed is published and read; anything else raises a `SignatureError`.
    """

    def __init__(self, url: str | os.PathLike[str], *, signers: Signers | None = None, **storage_options: Any) -> None:
        self.signers = signers
        self._storage = open_storage(url, storage_options)
        self._files = Index(self._storage)
        self.url = self._storage.url

    def exists(self) -> bool:
        """Return True if there is a store already. Publishing makes one."""
        return self._storage.is_there()

    def publish(
        self,
        name: str,
        patch: Patch | bytes | str | os.PathLike[str],
        tags: Sequence[str] = (LATEST,),
        *,
        other_backbone: bool = False,
        signature: bytes | None = None,
    ) -> Version:
        """Add a patch, the bytes of a patch file or its path, and let `tags` name it. Returns the version.

        `signature` is the content of its signature file; that beside a path is found without it. One that is not of these
        bytes is refused.

        The bytes are read back as a patch before anything is written. The same bytes under the same name are the same version,
        whose files are written anew. Raises a `PatchFileError` for anything but an intact patch. Unless `other_backbone` says
        that it is meant, raises `OtherBackboneError` for a patch of another backbone than that of the version that `latest`
        names, or of the newest where there is no such tag.
        """
        check_name(name)
        tags = tuple(dict.fromkeys(map(check_tag, (tags,) if isinstance(tags, str) else tags)))
        data, source = _bytes_of(patch)
        if signature is None and isinstance(patch, str | os.PathLike):
            signature = read_beside(patch)
        signers = self.check_signature(data, signature, source)
        decoded = decode_patch(data, source)
        version = Version.of(name, data, decoded, signers)
        if not other_backbone:
            self._check_backbone(version, decoded)
        return self._publish(version, data, tags, signature)

    def check_signature(self, data: bytes, signature: bytes | None, name: str) -> tuple[str, ...]:
        """The signers that a file's signature claims, none without one. Raises a `SignatureError`.

        With the store's `signers` one of them has signed these bytes; without, the signature is of these bytes, as it says.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        read = None if signature is None else Signature.read(signature, f"the signature of {name}")
        if self.signers is not None:
            self.signers.check(sha256, read, name)
        elif read is not None:
            read.check_subject(sha256, name)
        return read.claims if read else ()

    def tag(self, name: str, tag: str, version: Version | str, *, other_backbone: bool = False) -> Version:
        """Let a tag name a version of `name`, and no other. Returns the version.

        Raises `UnknownPatchError` for a version that is not there, `StoreError` for one of another name, and
        `OtherBackboneError` as `publish` does.
        """
        check_tag(tag)
        found = self.resolve(version)
        if found.name != check_name(name):
            raise StoreError(f"{found} is no version of {name}. Publish it under that name: load it, then publish it.")
        if not other_backbone:
            self._check_backbone(found)
        with self._files.changing(name):
            self._storage.write(path_of(name, tag + TAG), found.hash.encode())
            if not is_whole(found.hash, self._files.files(name)):  # it was removed meanwhile
                self._storage.delete(path_of(name, tag + TAG))
                raise UnknownPatchError(f"{found} is not in the store any more: it was removed.")
        return replace(found, tags=tuple(sorted({*found.tags, tag})))

    def untag(self, name: str, tag: str) -> None:
        """Remove a tag; the version stays until `collect`. Raises `UnknownPatchError` for a tag that is not there."""
        if check_tag(tag) + TAG not in self._files.files(check_name(name)):
            raise self._unknown_version(name, tag)
        with self._files.changing(name):
            self._storage.delete(path_of(name, tag + TAG))

    def remove(self, reference: str | Version, force: bool = False) -> Version:
        """Remove a version, and with `force` the tags that name it. Returns what was removed.

        Raises `TaggedVersionError` without `force` if a tag names it, `UnknownPatchError` for one that is not there.
        """
        version = self.resolve(reference)
        with self._files.changing(version.name):
            if version.tags and not force:
                named = ", ".join(version.tags)
                raise TaggedVersionError(f"{version} is tagged {named}.", "Remove the tag first, or force the removal.")
            for tag in version.tags:
                self._storage.delete(path_of(version.name, tag + TAG))
            if not self._drop(version):
                raise TaggedVersionError(f"{version} was tagged while it was being removed. It is still there.")
        return version

    def collect(self, dry_run: bool = False) -> Versions:
        """Remove every version that no tag names; with `dry_run` nothing. Returns those versions.

        Files that writers left who died more than an hour ago go as well. Raises `DamagedPatchError` for a tag that cannot be
        read, since its version is not known: nothing of that name is removed then.
        """
        removed = []
        for name, files in sorted(self._files.all_files().items()):
            tagged = self._files.tags(name, strict=True).values()
            untagged = [version for version in self._files.versions(name, files) if version.hash not in tagged]
            if dry_run:
                removed += untagged
                continue
            if untagged:
                with self._files.changing(name):
                    removed += [version for version in untagged if self._drop(version)]
            whole = {hash + end for hash in self._files.hashes(name) for end in (FILE, SIGNATURE)}
            left = [f for f in files if is_temporary(f) or (f.endswith((FILE, SIGNATURE)) and f not in whole)]
            self._storage.sweep(path_of(name, file) for file in left)
        if not dry_run:
            self._storage.sweep(f"{INDEX}/{file}" for file in self._storage.names(INDEX) if is_temporary(file))
        return removed

    def rebuild(self) -> Versions:
        """Make the index anew from the files. Never needed for right answers: a store that was copied or mended by hand."""
        return self._files.rebuild()

    def list(self) -> Versions:
        """All versions of all names, by name and age, from the index."""
        return self._files.listing()

    def versions(self, name: str) -> Versions:
        """All versions of a name, the oldest first. Raises `UnknownPatchError` where there is none."""
        found = self._files.versions(check_name(name))
        if not found and self._files.hashes(name):
            raise DamagedPatchError(f"the records of all versions of {name} are damaged. Publish the patch again.")
        if not found:
            raise self._unknown_name(name)
        return found

    def resolve(self, reference: str | Version) -> Version:
        """The version that `NAME`, `NAME@TAG` or `NAME@HASH` names; of a hash, 8 digits that tell it apart are enough.

        A tag comes before a hash that begins like it. Raises `UnknownPatchError` with the names that are near.
        """
        name, rest = parse_reference(reference.reference if isinstance(reference, Version) else reference)
        for attempt in range(TRIES):
            hash = rest if HASH.fullmatch(rest) else self._hash_of_tag(name, rest)
            try:
                return self._files.version(name, hash, self._files.tags(name))
            except FileNotFoundError:
                if hash == rest:
                    raise self._unknown_version(name, rest) from None
                time.sleep(PAUSE * attempt)  # the tag has moved on, or a writer is putting the version back
        what = f"{name}@{rest} names the version {hash[:12]}, which is not there"
        raise DamagedPatchError(f"{what}.", "Publish it again, or move the tag.")

    def read(self, version: Version | str) -> bytes:
        """The bytes of a version's patch file. Raises `DamagedPatchError` unless they are the ones that were published."""
        return self._read(version)[1]

    def signature(self, version: Version | str) -> bytes | None:
        """The content of a version's signature file, None if it has none."""
        found = version if isinstance(version, Version) else self.resolve(version)
        with suppress(FileNotFoundError):
            return self._storage.read(path_of(found.name, found.hash + SIGNATURE))
        return None

    def load(self, reference: str | Version) -> Patch:
        """A patch, checked by its hash and like any patch file."""
        version, data = self._read(reference)
        return decode_patch(data, str(version))

    def verify(self, advance: Callable[[int], None] = lambda count: None) -> Faults:
        """Read everything and return the faults: files that are damaged or missing, tags that name nothing, a wrong index.

        `advance` is told how many names are done. What writers that died left behind is no problem; `collect` removes it.
        """
        problems: Faults = []
        for name, files in sorted(self._files.all_files().items()):
            for file in sorted(files):
                try:
                    what = self._verify(name, file)
                except (FileNotFoundError, UnknownPatchError):  # it was removed just now
                    continue
                except ModelpatchError as error:
                    what = str(error)
                if what:
                    problems.append(Fault(path_of(name, file), what))
            advance(1)
        if not problems and self.list() != self._files.scan() != self.list():  # unless others write just now
            problems.append(Fault("index", "it does not agree with the files. Rebuild it: store.rebuild()."))
        return problems

    def push(self, other: "Store", references: str | Iterable[str], *, other_backbone: bool = False) -> Versions:
        """Copy versions to another store, checked, with the tag that each reference names. Returns them as they are there.

        Raises `OtherBackboneError` as the other store's `publish` does.
        """
        copied = []
        for reference in (references,) if isinstance(references, str) else tuple(references):
            version, data = self._read(reference)
            patch, signature = decode_patch(data, str(version)), self.signature(version)
            version = replace(version, signers=other.check_signature(data, signature, str(version)))
            if not other_backbone:
                other._check_backbone(version, patch)
            rest = parse_reference(reference)[1]
            copied.append(other._publish(version, data, (rest,) if rest in version.tags else (), signature))
        return copied

    def pull(self, other: "Store", references: str | Iterable[str], *, other_backbone: bool = False) -> Versions:
        """Copy versions from another store: `other.push(self, references)`."""
        return other.push(self, references, other_backbone=other_backbone)

    def _read(self, reference: Version | str) -> tuple[Version, bytes]:
        for attempt in range(TRIES):
            version = reference if isinstance(reference, Version) and not attempt else self.resolve(reference)
            try:
                data = self._storage.read(path_of(version.name, version.hash + FILE))
                break
            except FileNotFoundError:  # the tag has moved on and the old version was collected, or is being put back
                time.sleep(PAUSE * attempt)
        else:
            raise DamagedPatchError(f"the file of {version} is missing.", PUBLISH)
        if hashlib.sha256(data).hexdigest() != version.hash:
            said = f"the file of {version} is damaged: its bytes are not those that were published."
            raise DamagedPatchError(said, PUBLISH)
        if self.signers is not None:
            self.check_signature(data, self.signature(version), str(version))
        return version, data

    def _check_backbone(self, version: Version, patch: Patch | None = None) -> None:
        """Raise `OtherBackboneError` unless a version is of its name's backbone; it is read if its patch is not given.

        That of the version that `latest` names, or of the newest, which can be read. A name without versions takes any.
        """
        for known in self._newest(version.name):
            if known.hash == version.hash:
                return
            try:
                ours = self.load(known).backbone
            except (PatchError, StoreError, MissingExtraError):
                continue
            if difference := ours.difference((patch or self.load(version)).backbone):
                raise OtherBackboneError(
                    f"{known} and {version} are of different backbones: {difference}.",
                    "A server of the one refuses the other. Use another name, or say that it is meant: --other-backbone, in "
                    "Python other_backbone=True.",
                )
            return

    def _newest(self, name: str) -> Iterator[Version]:
        """The version that `latest` names, then all, the newest first."""
        with suppress(FileNotFoundError, DamagedPatchError):
            yield self._files.version(name, self._files.tag(name, LATEST), {})
        yield from reversed(self._files.versions(name))

    def _publish(self, version: Version, data: bytes, tags: Sequence[str], signature: bytes | None) -> Version:
        name, hash = version.name, version.hash
        with self._files.changing(name):
            for _ in range(TRIES):
                self._storage.write(path_of(name, hash + FILE), data)
                if signature is not None:
                    self._storage.write(path_of(name, hash + SIGNATURE), signature)
                try:
                    known = self._files.version(name, hash, {})
                    version = replace(known, signers=known.signers if signature is None else version.signers)
                except (FileNotFoundError, DamagedPatchError):
                    known = None
                if version != known:
                    self._storage.write(path_of(name, hash + RECORD), version.record())
                for tag in tags:
                    self._storage.write(path_of(name, tag + TAG), hash.encode())
                files = self._files.files(name)
                if is_whole(hash, files):  # unless it was collected before a tag named it
                    return with_tags(version, self._files.tags(name, files))
        raise StoreError(f"{version} was removed {TRIES} times while it was being published. Publish it again.")

    def _drop(self, version: Version) -> bool:
        """Remove a version's files unless a tag names it, and put back what another writer needs meanwhile."""
        files, storage, name, hash = self._files, self._storage, version.name, version.hash
        if hash in files.tags(name, strict=True).values():
            return False
        storage.delete(path_of(name, hash + RECORD))
        if hash in files.tags(name, strict=True).values():  # tagged between the two
            storage.write(path_of(name, hash + RECORD), version.record())
            return False
        with suppress(FileNotFoundError):
            data = storage.read(path_of(name, hash + FILE))
            storage.delete(path_of(name, hash + FILE))
            if hash in files.hashes(name):  # published anew between the two
                storage.write(path_of(name, hash + FILE), data)
                return False
        storage.delete(path_of(name, hash + SIGNATURE))
        return True

    def _verify(self, name: str, file: str) -> str:
        """The fault of a file, empty if it has none. Raises the errors of reading it."""
        if file.endswith(TAG):
            tag = file.removesuffix(TAG)
            hash = self._files.tag(name, tag)
            if hash not in self._files.hashes(name) and self._files.tag(name, tag) == hash:  # unless it moved meanwhile
                return f"it names the version {hash[:12]}, which is not there. Publish it again, or move the tag."
        if file.endswith(RECORD):
            recorded = self._files.version(name, file.removesuffix(RECORD), {})
            data = self.read(recorded)
            signers = self.check_signature(data, self.signature(recorded), str(recorded))
            written = Version.of(name, data, decode_patch(data, str(recorded)), signers)
            if replace(written, created=recorded.created) != recorded:
                return "the record is not that of the patch. Delete it and publish again."
        return ""

    def _hash_of_tag(self, name: str, rest: str) -> str:
        """The hash that a tag or the beginning of a hash names. Raises `UnknownPatchError`."""
        with suppress(FileNotFoundError):
            return self._files.tag(name, rest)
        if PREFIX.fullmatch(rest):
            hashes = sorted(hash for hash in self._files.hashes(name) if hash.startswith(rest))
            if len(hashes) == 1:
                return hashes[0]
            if hashes:
                given = ", ".join(hash[:16] for hash in hashes)
                raise UnknownPatchError(f"{name}@{rest} is no single version: {given} begin so. Give more digits.")
        raise self._unknown_version(name, rest)

    def _unknown_version(self, name: str, rest: str) -> UnknownPatchError:
        hashes, tags = self._files.hashes(name), self._files.tags(name)
        if not hashes:
            return self._unknown_name(name)
        known = f"its tags: {', '.join(sorted(tags)) or 'none'}; its versions: {len(hashes)}"
        return UnknownPatchError(f"the store has {name}, but no {name}@{rest[:64]}; {known}.")

    def _unknown_name(self, name: str) -> UnknownPatchError:
        alike = [other for other in self._storage.names(PATCHES) if other[0] == name[0] and NAME.fullmatch(other)]
        near = [other for other in difflib.get_close_matches(name, sorted(alike)[:NEAR]) if other != name]
        guess = f" Did you mean {' or '.join(near)}?" if near else ""
        advice = "" if near else "See `modelpatch store ls`."
        return UnknownPatchError(f"there is no patch {name!r} in the store.{guess}", advice)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"


def _bytes_of(patch: Any) -> tuple[bytes, str]:
    """A patch file's bytes, and what to call it in messages."""
    if isinstance(patch, Patch):
        return encode_patch(patch), repr(patch)
    if isinstance(patch, bytes | bytearray | memoryview):
        return bytes(patch), "the patch"
    if not isinstance(patch, str | os.PathLike):
        raise NotAPatchError(f"{type(patch).__name__} is no patch. Expected a Patch, a patch file's bytes or its path.")
    return read_patch_file(patch), str(patch)
