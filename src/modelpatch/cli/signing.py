"""The verb `sign`, and the options that name signers."""

import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from modelpatch.atomic import write_bytes
from modelpatch.cli.console import Screen
from modelpatch.cli.verb import verb
from modelpatch.errors import KeyFileError, LockedKeyError, ModelpatchError
from modelpatch.plain_files import read_plain

PASSPHRASE = "MODELPATCH_KEY_PASSPHRASE"
SignerOption = Annotated[
    list[str] | None,
    Option(
        "--signer", help="A public key, a folder of them, or sigstore:WHO,ISSUER: one must have signed; repeatable."
    ),
]
RequiredOption = Annotated[
    list[str] | None,
    Option(
        "--require-signer",
        help="Refuse what none of these signed: a public key, a folder of them, sigstore:WHO,ISSUER.",
    ),
]


@verb(first="key sigstore new_key")
def sign(
    console: Screen,
    files: list[Path] | None = Argument(None, metavar="PATCH...", help="Files of patches or cascades."),
    key: Path | None = Option(None, "--key", "-k", help="Your private Ed25519 key: PEM, or as OpenSSH writes it."),
    sigstore: bool = Option(
        False, "--sigstore", help="Sign as the identity that you or this workflow is logged in as."
    ),
    new_key: Path | None = Option(None, help="Write a new private key there, and its public half with .pub behind."),
) -> None:
    """Sign patch files: the signature is written beside each, as PATCH.sig.

    A locked key takes its passphrase from MODELPATCH_KEY_PASSPHRASE, or asks for it.
    """
    from modelpatch.patch.keys import make_key, read_private_key

    if bool(files) != (key is not None or sigstore) or (key is not None and sigstore) or not (files or new_key):
        raise ModelpatchError(
            "give files with --key FILE or --sigstore to sign them, or --new-key FILE to make a pair of keys."
        )
    if new_key is not None:
        made = make_key(new_key, os.environ.get(PASSPHRASE))
        console.tell(f"wrote {new_key}, to keep to yourself, and {new_key}.pub, for others; id {made.id[:16]}")
    private = None
    if key is not None:
        try:
            private = read_private_key(key, os.environ.get(PASSPHRASE))
        except LockedKeyError as error:
            if not sys.stdin.isatty() or os.environ.get(PASSPHRASE):
                raise KeyFileError(f"{error.detail} Set {PASSPHRASE}.") from error
            private = read_private_key(key, typer.prompt(f"Passphrase of {key}", hide_input=True, err=True))
    rows = [_sign(path, private) for path in files or ()]
    for row in rows:
        console.tell(f"signed {row['file']} (sha256 {row['sha256'][:16]}) as {row['signer'][:64]}: {row['signature']}")
    console.write_json(rows)


def _sign(path: Path, private: Any) -> dict[str, Any]:
    """Sign one file, which is read back as a patch or cascade first, and return a row about it."""
    from modelpatch.engine.cascade import Cascade, is_cascade
    from modelpatch.patch.bundles import sign_bundle
    from modelpatch.patch.contents import decode_patch, read_patch_file
    from modelpatch.patch.envelope import Signature, make_statement, read_beside, signature_path
    from modelpatch.patch.keys import sign as sign_statement

    if is_cascade(path):
        facts: dict[str, Any] = {"cascade": [one.content_hash for one in Cascade.load(path).patches]}
        data = read_plain(path)
    else:
        data = read_patch_file(path)
        facts = decode_patch(data, str(path)).provenance
    statement, place = make_statement(data, path.name, facts), signature_path(path)
    raw = sign_bundle(statement) if private is None else sign_statement(statement, private, read_beside(path))
    write_bytes(place, raw)
    signer = Signature.read(raw, str(place)).claims[-1]
    return {"file": str(path), "sha256": sha256(data).hexdigest(), "signature": str(place), "signer": signer}


def signers_of(given: list[str] | None) -> Any:
    """The signers that options name; None without any. Raises `KeyFileError`."""
    from modelpatch.patch.signing import Signers

    return Signers.of(*given) if given else None
