"""Signatures of manifests: in-toto statements in DSSE envelopes, made and checked by model-signing."""

import importlib
import os
from pathlib import Path
from typing import Any, Literal

from .keys import read_private
from .strict_json import ProvenanceError

MAX_BYTES = 1 << 20  # of a signature


def sign(
    manifest: str | os.PathLike[str],
    signature: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str] | None = None,
    identity_token: str | None = None,
) -> None:
    """Sign the file of a manifest, byte by byte.

    Args:
        manifest: a file of `Manifest.save`.
        signature: file to write, a Sigstore bundle.
        key: file of an ECDSA key, of `new_key`. Default: keyless through Sigstore, which needs the network and who
            you are: ``identity_token``, what a CI service offers of its own, or a browser.
        identity_token: OpenID token for Sigstore.

    Raises:
        ImportError: model-signing is missing; the extra ``provenance`` brings it.
        ProvenanceError: the key is no ECDSA key, or Sigstore cannot be reached.

    Example:
        >>> import pathlib, tempfile
        >>> from mlx_bulwark.provenance import Manifest, new_key
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "data").mkdir()
        >>> Manifest.build(folder / "data").save(folder / "manifest.json")
        >>> new_key(folder / "key")
        >>> sign(folder / "manifest.json", folder / "manifest.sig", key=folder / "key")
        >>> verify_signature(folder / "manifest.json", folder / "manifest.sig", key=folder / "key.pub")

    Source: in-toto attestations and DSSE, https://github.com/in-toto/attestation; OpenSSF model signing.
    """
    config = _part("signing").Config()
    if key is not None:
        read_private(key)
        _local(lambda: config.use_elliptic_key_signer(private_key=key), key)
        config.sign(manifest, signature)
        return
    # What CI offers of its own goes before a browser.
    who = {"identity_token": identity_token, "use_ambient_credentials": identity_token is None}
    _online(lambda: config.use_sigstore_signer(**who).sign(manifest, signature))


def verify_signature(
    manifest: str | os.PathLike[str],
    signature: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str] | None = None,
    identity: str | None = None,
    oidc_issuer: str | None = None,
) -> None:
    """Check that a manifest's file is the one that was signed.

    Args:
        manifest: a file of `Manifest.save`.
        signature: file that `sign` wrote.
        key: file of the public key. Without one the signature is Sigstore's, and who signed must be named:
        identity: e.g. an address of mail, and
        oidc_issuer: who vouches for it.

    Raises:
        ImportError: model-signing is missing.
        ProvenanceError: the signature does not hold, or has bytes that it does not cover.
        OSError: a file cannot be read.
    """
    config = _part("verifying").Config()
    _refuse_large(signature)
    if key is not None:
        _local(lambda: config.use_elliptic_key_verifier(public_key=key), key)
        _check_form(signature)
        _check(lambda: config.verify(manifest, signature), manifest)
        return
    if identity is None or oidc_issuer is None:
        raise ValueError("[verify_signature] key, or identity and oidc_issuer, must be given but are not")
    _online(lambda: config.use_sigstore_verifier(identity=identity, oidc_issuer=oidc_issuer))
    _check(lambda: config.verify(manifest, signature), manifest)


def _part(name: Literal["signing", "verifying"]) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as e:
        raise ImportError(
            f'signatures need model-signing and pyopenssl; pip install "mlx-bulwark[provenance]" brings them ({e})'
        ) from None


def _local(use: Any, key: str | os.PathLike[str]) -> None:
    try:
        use()
    except (ValueError, TypeError, AttributeError) as e:
        # No words of the error: they may quote the file.
        raise ProvenanceError(f"[sign] {os.fspath(key)} must be an ECDSA key but is not ({type(e).__name__})") from None


def _online(use: Any) -> None:
    try:
        use()
    except Exception as e:  # of any of the packages between here and the network
        raise ProvenanceError(
            f"[sign] Sigstore must be reachable and know who you are but is not: {type(e).__name__}: {e}; "
            "a local key needs no network: mlx-bulwark manifest sign --new-key --key FILE"
        ) from e


def _check(verify: Any, manifest: str | os.PathLike[str]) -> None:
    try:
        verify()
    except OSError:
        raise
    except Exception as e:  # of any of the packages that take the signature apart
        raise ProvenanceError(
            f"[verify_signature] {os.fspath(manifest)} must be what was signed but is not: {type(e).__name__}: {e}"
        ) from None


def _refuse_large(signature: str | os.PathLike[str]) -> None:
    if os.path.getsize(signature) > MAX_BYTES:
        raise ProvenanceError(f"[verify_signature] {os.fspath(signature)} must have at most {MAX_BYTES} bytes")


def _check_form(signature: str | os.PathLike[str]) -> None:
    """Refuse what DSSE does not sign: other spellings of the same bundle, and a name of the key."""
    from model_signing._signing.sign_sigstore_pb import Signature

    try:
        bundle: Any = Signature.read(Path(signature)).bundle
        same = bundle.to_json().encode() == Path(signature).read_bytes()
        only = bundle.dsse_envelope.signatures
        unsigned = bundle.verification_material.tlog_entries or len(only) != 1 or only[0].keyid
    except Exception as e:  # whatever a hostile file makes of the parsers
        raise ProvenanceError(
            f"[verify_signature] {os.fspath(signature)} must be a signature but is not: {type(e).__name__}"
        ) from None
    if not same or unsigned:
        raise ProvenanceError(f"[verify_signature] {os.fspath(signature)} must be as it was written but is not")
