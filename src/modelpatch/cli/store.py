"""`modelpatch store`: patches by name, version and tag, in a folder or an object store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import ForceOption, JsonOption, Screen, check_out
from modelpatch.errors import ModelpatchError, StoreError

if TYPE_CHECKING:
    from modelpatch.store.store import Store

store = typer.Typer(
    name="store",
    help="Keep patches by name, version and tag, in a folder or under s3://, gs:// or hf://.",
    no_args_is_help=True,
)
PLACE = "A folder, or a URL such as s3://bucket/patches"
REFERENCE = "NAME (its tag `latest`), NAME@TAG or NAME@HASH, 8 digits or more."
StoreArgument = Annotated[str, Argument(metavar="STORE", help=f"{PLACE}.")]
NewStoreArgument = Annotated[str, Argument(metavar="STORE", help=f"{PLACE}; made if nothing is there.")]
TargetArgument = Annotated[str, typer.Argument(metavar="OTHER", help="The store to copy to; made if nothing is there.")]
SourceArgument = Annotated[str, typer.Argument(metavar="OTHER", help="The store to copy from.")]
ReferenceArgument = Annotated[str, Argument(metavar="REFERENCE", help=REFERENCE)]
ReferencesArgument = Annotated[list[str], Argument(metavar="REFERENCE...", help=f"What to copy: {REFERENCE}")]


@store.command("ls")
def list_versions(
    store: StoreArgument,
    name: str | None = Argument(None, help="List the versions of this patch alone."),
    json: JsonOption = None,
) -> None:
    """List all versions, or those of one name, the oldest first."""
    from modelpatch.report.tables import versions_table

    console = Screen(json)
    opened = open_store(store)
    versions = opened.list() if name is None else opened.versions(name)
    if versions:
        console.show(versions_table(versions))
    else:
        console.tell(f"no patches in {opened.url}; `modelpatch store add {store} NAME FILE` publishes one")
    console.write_json([version.as_dict() for version in versions])


@store.command("add")
def add(
    store: NewStoreArgument,
    name: str = Argument(..., help="The patch's name: a-z, 0-9, '.', '_' and '-'."),
    patch: Path = Argument(..., help="The patch file."),
    tag: list[str] | None = Option(None, help="A tag for it, by default latest; may be repeated."),
) -> None:
    """Check a patch file and publish it; the first one makes the store."""
    from modelpatch.store.store import Store

    version = Store(store).publish(name, patch, tags=tag or ("latest",))
    Screen().tell(f"published {version}, {version.nbytes:,} bytes, as {', '.join(version.tags)}")


@store.command("show")
def show_version(store: StoreArgument, reference: ReferenceArgument, json: JsonOption = None) -> None:
    """Show one version."""
    from modelpatch.report.tables import version_table

    console = Screen(json)
    version = open_store(store).resolve(reference)
    console.show(version_table(version))
    console.write_json(version.as_dict())


@store.command("get")
def get(
    store: StoreArgument,
    reference: ReferenceArgument,
    out: Path = Option(..., "--out", "-o", help="The patch file to write."),
    force: ForceOption = False,
) -> None:
    """Check a version's patch file and write it."""
    check_out(out, force)
    opened = open_store(store)
    version = opened.resolve(reference)
    opened.load(version)
    write_bytes(out, opened.read(version))
    Screen().tell(f"wrote {out} ({version}, {version.nbytes:,} bytes)")


@store.command("tag")
def set_tag(
    store: StoreArgument,
    reference: ReferenceArgument,
    tag: str | None = Argument(None, help="The tag."),
    delete: bool = Option(False, "--delete", help="Remove the tag: NAME@TAG --delete."),
) -> None:
    """Set a tag to a version, or remove a tag."""
    opened = open_store(store)
    if delete == (tag is not None):
        raise ModelpatchError("give either REFERENCE TAG, to set the tag, or NAME@TAG --delete, to remove it.")
    name, _, old = reference.partition("@")
    if tag is None:
        opened.untag(name, old)
        Screen().tell(f"{name} has no tag {old} any more")
    else:
        Screen().tell(f"{name}@{tag} is now {opened.tag(name, tag, reference)}")


@store.command("rm")
def remove(
    store: StoreArgument,
    reference: ReferenceArgument,
    force: bool = Option(False, "--force", help="Remove its tags too."),
) -> None:
    """Remove one version."""
    Screen().tell(f"removed {open_store(store).remove(reference, force=force)}")


@store.command("verify")
def verify(store: StoreArgument, json: JsonOption = None) -> None:
    """Check every byte of a store and print what is wrong. Exit status 1 if anything is."""
    console = Screen(json)
    opened = open_store(store)
    versions = opened.list()
    names = len({version.name for version in versions})
    with console.progress("verify") as bar, bar.task(opened.url, names) as advance:
        problems = opened.verify(advance)
    for problem in problems:
        console.tell(str(problem))
    console.write_json([{"where": problem.where, "what": problem.what} for problem in problems])
    if problems:
        raise StoreError(f"{opened.url} has {len(problems)} problems.")
    console.tell(f"{opened.url} is intact: {len(versions)} versions of {names} patches")


@store.command("gc")
def collect(
    store: StoreArgument,
    dry_run: bool = Option(False, "--dry-run", help="Print what would be removed, and remove nothing."),
) -> None:
    """Remove every version that no tag names."""
    removed = open_store(store).collect(dry_run=dry_run)
    console = Screen()
    for version in removed:
        console.tell(str(version))
    total = sum(version.nbytes for version in removed)
    console.tell(f"{'would remove' if dry_run else 'removed'} {len(removed)} versions, {total:,} bytes")


@store.command("push")
def push(store: StoreArgument, other: TargetArgument, references: ReferencesArgument) -> None:
    """Copy versions from STORE to OTHER, each with its tag: flowers@prod is flowers@prod there too.

    NAME alone is NAME@latest. A version given by its hash is copied without a tag; `store tag` adds one.
    """
    from modelpatch.store.store import Store

    _copy(open_store(store), Store(other), references)


@store.command("pull")
def pull(store: NewStoreArgument, other: SourceArgument, references: ReferencesArgument) -> None:
    """Copy versions from OTHER to STORE, with the same tags."""
    from modelpatch.store.store import Store

    _copy(open_store(other), Store(store), references)


def open_store(url: str) -> Store:
    """Open a store to read from it. Raises `StoreError` if nothing is there."""
    from modelpatch.store.store import Store

    opened = Store(url)
    if not opened.exists():
        raise StoreError(f"there is no store at {url}.", f"`modelpatch store add {url} NAME FILE` makes one.")
    return opened


def _copy(source: Store, target: Store, references: list[str]) -> None:
    console = Screen()
    with console.progress("copy") as bar, bar.task(target.url, len(references)) as advance:
        for reference in references:
            (version,) = source.push(target, reference)
            console.tell(f"copied {version} to {target.url}")
            advance(1)
