"""Sigstore bundles: signatures by an identity (an address, a workflow) that its login vouches for, instead of by a key.

`sigstore` asks for the certificate, writes the public log and checks both; the signed statement is that of
`modelpatch.patch.envelope`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from modelpatch.errors import DamagedSignatureError, KeyFileError, SignatureError, require
from modelpatch.patch.envelope import AGAIN, Signature
from modelpatch.text import first_line

SIGSTORE = "sigstore:"
PURPOSE = "a sigstore signature"
LOGIN = "Log in: `python -m sigstore get-identity-token`, or run where a workflow has an identity (id-token: write)."


@dataclass(frozen=True)
class Identity:
    """Somebody by the name that a login service (`issuer`) vouches for; `id` is both, as signatures claim them."""

    name: str
    issuer: str

    @classmethod
    def of(cls, source: str) -> Self:
        """`sigstore:IDENTITY,ISSUER`. Raises `KeyFileError` for other texts, `MissingExtraError` without `sigstore`."""
        who, separator, issuer = source.removeprefix(SIGSTORE).rpartition(",")
        if not who or not separator or not issuer.startswith("https://"):
            wanted = "Expected sigstore:IDENTITY,ISSUER such as sigstore:me@example.org,https://accounts.google.com"
            raise KeyFileError(f"{source[:200]!r} names no identity. {wanted}")
        require("sigstore", "sigstore", PURPOSE)
        return cls(who, issuer)

    @property
    def id(self) -> str:
        return f"{self.name},{self.issuer}"

    def signed(self, signature: Signature) -> bool:
        """Return True if a bundle is by this identity. Raises `DamagedSignatureError` for one of it that was altered."""
        if not signature.is_bundle or self.id not in signature.claims:
            return False
        models = require("sigstore.models", "sigstore", PURPOSE, "sigstore")
        policy = require("sigstore.verify.policy", "sigstore", PURPOSE, "sigstore")
        try:
            bundle = models.Bundle.from_json(signature.raw)
            said = policy.Identity(identity=self.name, issuer=self.issuer)
            payload = _verifier().verify_dsse(bundle, said)[1]
        except SignatureError:
            raise
        except Exception as error:  # of sigstore, pydantic and cryptography
            raise DamagedSignatureError(f"{signature.name} does not verify: {first_line(error)}.", AGAIN) from error
        return bool(payload == signature.envelope.payload)


def sign_bundle(statement: bytes) -> bytes:
    """The sigstore bundle of a statement, signed with the identity of the place where this runs.

    That is a workflow's, or the token of `SIGSTORE_ID_TOKEN`; else a browser asks for a login. Raises `SignatureError`.
    """
    import os

    require("sigstore", "sigstore", PURPOSE)
    from sigstore.dsse import Statement
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken, Issuer, detect_credential
    from sigstore.sign import SigningContext

    try:
        config = ClientTrustConfig.production()
        given = os.environ.get("SIGSTORE_ID_TOKEN") or detect_credential()
        token = IdentityToken(given) if given else Issuer(config.signing_config.get_oidc_url()).identity_token()
        with SigningContext.from_trust_config(config).signer(token) as signer:
            return str(signer.sign_dsse(Statement(statement)).to_json()).encode() + b"\n"
    except (Exception, SystemExit) as error:
        raise SignatureError(f"sigstore cannot sign: {first_line(error)}.", LOGIN) from error


@cache
def _verifier() -> Any:
    """Sigstore's verifier, with the roots of trust of today or, without a network, those that were last fetched."""
    from sigstore.verify import Verifier

    try:
        return Verifier.production()
    except Exception:
        try:
            return Verifier.production(offline=True)
        except Exception as error:
            raise SignatureError(f"sigstore's roots of trust cannot be read: {first_line(error)}.") from error
