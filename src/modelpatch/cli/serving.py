"""Verbs of stores and servers: `store` and `serve`."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import modelpatch as mp
from modelpatch.atomic import write_bytes
from modelpatch.cli import options as opt
from modelpatch.cli.console import JsonOption, Screen, check_out
from modelpatch.cli.signing import RequiredOption, signers_of
from modelpatch.cli.verb import verb
from modelpatch.errors import ModelpatchError, ServeError, StoreError
from modelpatch.plain_files import read_plain
from modelpatch.report import tables
from modelpatch.serve.settings import Settings
from modelpatch.serve.tenants import Tenants

DEFAULT = Settings()
store = typer.Typer(
    name="store",
    help="Keep patches by name, version and tag, in a folder or under s3://, gs:// or hf://.",
    no_args_is_help=True,
)
PLACE = "A folder, or a URL such as s3://bucket/patches"
REFERENCE = "NAME (its tag `latest`), NAME@TAG or NAME@HASH, 8 digits or more."
StoreArgument = Annotated[str, Argument(metavar="STORE", help=f"{PLACE}.")]
NewStoreArgument = Annotated[str, Argument(metavar="STORE", help=f"{PLACE}; made if nothing is there.")]
OtherArgument = Annotated[str, Argument(metavar="OTHER", help="The other store; what is copied to is made.")]
ReferenceArgument = Annotated[str, Argument(metavar="REFERENCE", help=REFERENCE)]
OtherBackboneOption = Annotated[
    bool, Option("--other-backbone", help="Let it be of another backbone than the name's latest version.")
]
ReferencesArgument = Annotated[list[str], Argument(metavar="REFERENCE...", help=f"What to copy: {REFERENCE}")]


@store.command("ls")
def list_versions(
    store: StoreArgument,
    name: str | None = Argument(None, help="List the versions of this patch alone."),
    json: JsonOption = None,
) -> None:
    """List all versions, or those of one name, the oldest first."""
    console = Screen(json)
    opened = open_store(store)
    versions = opened.list() if name is None else opened.versions(name)
    if versions:
        console.show(tables.versions_table(versions))
    else:
        console.tell(f"no patches in {opened.url}; `modelpatch store add {store} NAME FILE` publishes one")
    console.write_json([version.as_dict() for version in versions])


@store.command("add")
def add(
    store: NewStoreArgument,
    name: str = Argument(..., help="The patch's name: a-z, 0-9, '.', '_' and '-'."),
    patch: Path = Argument(..., help="The patch file."),
    tag: list[str] | None = Option(None, help="A tag for it, by default latest; may be repeated."),
    other_backbone: OtherBackboneOption = False,
    require_signer: RequiredOption = None,
) -> None:
    """Check a patch file and publish it, with the signature beside it; the first one makes the store.

    A patch of another backbone than that name's is refused without `--other-backbone`.
    """
    version = mp.Store(store, signers=signers_of(require_signer)).publish(
        name, patch, tags=tag or ("latest",), other_backbone=other_backbone
    )
    Screen().tell(f"published {version}, {version.nbytes:,} bytes, as {', '.join(version.tags)}")


@store.command("show")
def show_version(store: StoreArgument, reference: ReferenceArgument, json: JsonOption = None) -> None:
    """Show one version."""
    console = Screen(json)
    version = open_store(store).resolve(reference)
    console.show(tables.version_table(version))
    console.write_json(version.as_dict())


@store.command("get")
def get(
    store: StoreArgument,
    reference: ReferenceArgument,
    out: Path = Option(..., "--out", "-o", help="The patch file to write."),
    force: opt.ForceOption = False,
    require_signer: RequiredOption = None,
) -> None:
    """Check a version's patch file and write it, and beside it its signature where it has one."""
    from modelpatch.patch.envelope import signature_path

    opened = open_store(store, require_signer)
    version = opened.resolve(reference)
    signature = opened.signature(version)
    check_out([out] if signature is None else [out, signature_path(out)], force)
    opened.load(version)
    write_bytes(out, opened.read(version))
    if signature is not None:
        write_bytes(signature_path(out), signature)
    Screen().tell(f"wrote {out} ({version}, {version.nbytes:,} bytes)")


@store.command("tag")
def set_tag(
    store: StoreArgument,
    reference: ReferenceArgument,
    tag: str | None = Argument(None, help="The tag."),
    delete: bool = Option(False, "--delete", help="Remove the tag: NAME@TAG --delete."),
    other_backbone: OtherBackboneOption = False,
) -> None:
    """Set a tag to a version, or remove a tag."""
    opened = open_store(store)
    if delete == (tag is not None) or (delete and other_backbone):
        raise ModelpatchError("give either REFERENCE TAG, to set the tag, or NAME@TAG --delete, to remove it.")
    name, _, old = reference.partition("@")
    if tag is None:
        opened.untag(name, old)
        Screen().tell(f"{name} has no tag {old} any more")
    else:
        found = opened.tag(name, tag, reference, other_backbone=other_backbone)
        Screen().tell(f"{name}@{tag} is now {found}")


@store.command("rm")
def remove(
    store: StoreArgument,
    reference: ReferenceArgument,
    force: bool = Option(False, "--force", help="Remove its tags too."),
) -> None:
    """Remove one version."""
    Screen().tell(f"removed {open_store(store).remove(reference, force=force)}")


@store.command("verify")
def verify_store(store: StoreArgument, require_signer: RequiredOption = None, json: JsonOption = None) -> None:
    """Check every byte of a store and print what is wrong. Exit status 1 if anything is."""
    console = Screen(json)
    opened = open_store(store, require_signer)
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
def push(
    store: StoreArgument,
    other: OtherArgument,
    references: ReferencesArgument,
    other_backbone: OtherBackboneOption = False,
    require_signer: RequiredOption = None,
) -> None:
    """Copy versions from STORE to OTHER, each with its tag: flowers@prod is flowers@prod there too.

    NAME alone is NAME@latest. A version given by its hash is copied without a tag; `store tag` adds one.
    """
    _copy(open_store(store, require_signer), mp.Store(other), references, other_backbone)


@store.command("pull")
def pull(
    store: NewStoreArgument,
    other: OtherArgument,
    references: ReferencesArgument,
    other_backbone: OtherBackboneOption = False,
    require_signer: RequiredOption = None,
) -> None:
    """Copy versions from OTHER to STORE, with the same tags."""
    _copy(open_store(other, require_signer), mp.Store(store), references, other_backbone)


def open_store(url: str, signers: list[str] | None = None) -> "mp.Store":
    """Open a store to read from it, maybe only what is signed. Raises `StoreError` if nothing is there."""
    opened = mp.Store(url, signers=signers_of(signers))
    if not opened.exists():
        raise StoreError(f"there is no store at {url}.", f"`modelpatch store add {url} NAME FILE` makes one.")
    return opened


def find_served(url: str) -> "mp.Backbone":
    """The backbone of a store's tagged patches. Raises `ServeError` where there are none, or patches of several backbones."""
    from modelpatch.patch.finding import find_backbone

    opened = open_store(url)
    chains = {version.chain: version for version in opened.list() if version.tags}
    if len(chains) != 1:
        named = ", ".join(sorted(f"{one.backbone} ({one.name}, ...)" for one in chains.values()))
        found = f"has patches of {len(chains)} backbones: {named}" if chains else "has no patch that a tag names yet"
        raise ServeError(f"the store {opened.url} {found}.", "Name the one to serve with --backbone.")
    (version,) = chains.values()
    return find_backbone(opened.load(version), None if "://" in url else Path(url))


def _copy(source: "mp.Store", target: "mp.Store", references: list[str], other_backbone: bool) -> None:
    console = Screen()
    with console.progress("copy") as bar, bar.task(target.url, len(references)) as advance:
        for reference in references:
            (version,) = source.push(target, reference, other_backbone=other_backbone)
            console.tell(f"copied {version} to {target.url}")
            advance(1)


@verb(first="backbone out seconds")
def tune(
    console: Screen,
    network: opt.GivenNetwork,
    out: Path = Option(Path("tuning.json"), "--out", "-o", help="Where to write the settings."),
    seconds: float = Option(20.0, min=0.1, help="How long to measure, about."),
    bfloat16: bool = Option(False, "--bfloat16", help="Allow 16-bit arithmetic, which moves logits by a hundredth."),
    force: opt.ForceOption = False,
) -> None:
    """Measure which settings of an engine are fastest here, for `serve --tuning` and `Engine(tuning=...)`.

    Without a file an engine follows a rule by device and architecture. Measure on a machine that does nothing else.
    """
    from modelpatch.engine.measuring import measure

    check_out(out, force)
    tuning = measure(network.open(), bfloat16=bfloat16, seconds=seconds)
    tuning.save(out)
    console.tell(f"{tuning}\nwrote {out}")
    console.write_json(asdict(tuning))


@verb(first="backbone host port token tenants require_signer workers cascade", panel="Limits")
def serve(
    network: opt.ServedNetwork,
    store: str = Argument(..., help="The folder or URL of a store of patches."),
    host: str = Option("127.0.0.1", help="Address to listen on; 0.0.0.0 is every network."),
    port: int = Option(8000, min=0, max=65535, help="Port; 0 takes a free one."),
    token: str | None = Option(None, envvar="MODELPATCH_TOKEN", help="To publish, tag and remove; none: nobody may."),
    require_signer: RequiredOption = None,
    workers: int = Option(1, min=1, help="Processes that answer and share the backbone's memory."),
    cache: int = Option(DEFAULT.cache_bytes, min=1, help="Bytes for resident patches, per worker."),
    deadline: float = Option(DEFAULT.deadline, min=0.1, help="Seconds per request, at most."),
    batch: int = Option(DEFAULT.batch, min=1, help="Images in a batch, at most."),
    queue: int = Option(DEFAULT.queue, min=1, help="Waiting images, at most; more get 429."),
    pixels: int = Option(DEFAULT.pixels, min=1, help="Pixels of an image, at most."),
    refresh: float = Option(DEFAULT.refresh, min=0, help="Seconds until changes of the store are seen."),
    requests: int = Option(DEFAULT.requests, min=1, help="Requests that are answered at once; more get 429."),
    per_client: int = Option(DEFAULT.per_client, min=1, help="Requests of one address at once; more get 429."),
    tenants: Path | None = Option(None, help="A TOML file of tenants: their keys' hashes, weights and budgets."),
    allowed_host: list[str] | None = Option(
        None, help="A name that browsers may ask for; may be repeated. By default any, on 127.0.0.1 it and localhost."
    ),
    tuning: Path | None = Option(None, help="Settings that `modelpatch tune` measured; by default a rule."),
    backend: opt.BackendOption = "auto",
    cascade: list[Path] | None = Option(None, help="A cascade to serve under its task's name; may be repeated."),
    ray: bool = Option(False, "--ray", help="Deploy replicas on Ray Serve instead of workers."),
    replicas: int = Option(2, min=1, help="Number of replicas, with --ray."),
) -> None:
    """Answer over HTTP with the patches of a store: any of them, several, or all at once, loaded on demand.

    The page is at /, the routes are described at /openapi.json. Ctrl-C or SIGTERM finishes what runs, then stops.
    """
    from modelpatch.engine.backends.base import choose_backend
    from modelpatch.engine.cascade import Cascade
    from modelpatch.engine.engine import BASE
    from modelpatch.patch.signing import check_file_signer
    from modelpatch.serve.run import check_libraries, serve_forever

    check_libraries()
    limits: dict[str, Any] = {"cache_bytes": cache, "deadline": deadline, "batch": batch, "queue": queue}
    limits |= {"images": min(DEFAULT.images, queue), "pixels": pixels, "refresh": refresh}
    own = ("127.0.0.1", "localhost") if host in ("127.0.0.1", "localhost") else ()
    limits |= {"requests": requests, "per_client": per_client, "hosts": tuple(allowed_host or own)}
    limits["tenants"] = None if tenants is None else Tenants.read(tenants)
    signers = signers_of(require_signer)
    settings = Settings(backend=backend, token=token, signers=signers, **limits)
    place = opt.find_device(network.device)
    choose_backend(backend, place)  # before anything is loaded
    cascades: dict[str, Cascade] = {}
    for file in cascade or []:
        loaded = Cascade.load(file)
        if signers is not None:
            check_file_signer(file, read_plain(file), signers)
        if loaded.task.name in (BASE, *cascades):
            raise ServeError(f"--cascade {file}: there is a task {loaded.task.name!r} already.")
        cascades[loaded.task.name] = loaded
    backbone, arguments = network.backbone, network.arguments
    load = (
        partial(find_served, store)
        if backbone is None
        else partial(opt.open_backbone, backbone, arguments, opt.find_device("cpu"))
    )
    options: dict[str, Any] = {"host": host, "port": port, "tuning": opt.read_tuning(tuning), "say": Screen().tell}
    if ray:
        from modelpatch.serve.deployment import deploy

        if cascades:
            raise ServeError("--cascade is for servers of this machine. Leave --ray out, or serve the patches alone.")
        if workers != 1:
            raise ServeError("--workers and --ray are two ways to have several processes. With --ray, give --replicas.")
        if backbone is None:
            found = load()
            backbone, arguments = (found.spec, found.arguments) if found.place is None else found.place.call
        deploy(store, backbone, arguments, str(place), settings, replicas=replicas, **options)
        return
    serve_forever(store, load, place, settings, workers=workers, cascades=cascades, **options)
