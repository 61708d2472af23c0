"""Key files: readable by their owner alone, and never shown."""

import os
import secrets
from pathlib import Path
from typing import Any, Literal

from .strict_json import ProvenanceError

KeyKind = Literal["ecdsa", "ed25519", "hmac"]
HMAC_HEADER = "mlx-bulwark hmac key, secret\n"


def new_key(path: str | os.PathLike[str], kind: KeyKind = "ecdsa") -> None:
    """Make a key in a new file of mode 0600; the public half goes into a file with ``.pub`` behind its name.

    Args:
        path: the file; it must not be there.
        kind: ``"ecdsa"`` (P-256) signs manifests; ``"ed25519"`` and ``"hmac"`` sign the heads of audit logs. An HMAC
            key has no public half: who verifies can also forge.

    Raises:
        FileExistsError: the file is there.
        ValueError: the kind is unknown.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "log.key")
        >>> new_key(path, "hmac")
        >>> oct(os.stat(path).st_mode & 0o777)
        '0o600'
    """
    if kind not in ("ecdsa", "ed25519", "hmac"):
        raise ValueError(f"[new_key] kind must be 'ecdsa', 'ed25519' or 'hmac' but is {kind!r}")
    if kind == "hmac":
        _write(path, (HMAC_HEADER + secrets.token_hex(32) + "\n").encode())
        return
    serialization, ec, ed25519 = _cryptography()
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ecdsa" else ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, private)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    Path(f"{os.fspath(path)}.pub").write_bytes(public)


def _write(path: str | os.PathLike[str], content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def read_private(path: str | os.PathLike[str]) -> bytes | Any:
    """A private key of a file: bytes of an HMAC key, or an object of cryptography."""
    if os.stat(path).st_mode & 0o077:
        raise ProvenanceError(f"[key] {os.fspath(path)} must be readable by its owner alone (chmod 600) but is not")
    content = Path(path).read_bytes()
    if content.startswith(HMAC_HEADER.encode()):
        return _hmac_key(path, content)
    try:
        return _cryptography()[0].load_pem_private_key(content, None)
    except (ValueError, TypeError) as e:
        # The words of the error may quote the file, and so the key.
        raise ProvenanceError(f"[key] {os.fspath(path)} must be a private key but is not: {type(e).__name__}") from None


def read_verifier(path: str | os.PathLike[str]) -> bytes | Any:
    """What verifies: a public key, the public half of a private one, or an HMAC key."""
    content = Path(path).read_bytes()
    if b"PUBLIC KEY" not in content:
        private = read_private(path)
        return private if isinstance(private, bytes) else private.public_key()
    try:
        return _cryptography()[0].load_pem_public_key(content)
    except ValueError as e:
        raise ProvenanceError(f"[key] {os.fspath(path)} must be a public key but is not: {type(e).__name__}") from None


def _hmac_key(path: str | os.PathLike[str], content: bytes) -> bytes:
    try:
        key = bytes.fromhex(content[len(HMAC_HEADER) :].decode().strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ProvenanceError(f"[key] {os.fspath(path)} must hold an HMAC key of 32 bytes but does not")
    return key


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError:
        raise ImportError('signing keys need cryptography; pip install "mlx-bulwark[provenance]" brings it') from None
    return serialization, ec, ed25519
