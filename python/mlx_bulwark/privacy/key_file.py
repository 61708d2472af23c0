"""The one key that outlives its engine: that of correlated noise, in a file of its own.

Who has it subtracts the noise. Under it no step may happen twice, which only a ledger can promise.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..ops.noise import random_key
from .books import Books
from .events import Banded
from .taps import PrivacyError

FORMAT, VERSION = "mlx-bulwark noise key, secret", 1


class Secrets(NamedTuple):
    """Key of the noise, and seed of the sampling scheme's partition."""

    key: mx.array
    partition: mx.array

    def __repr__(self) -> str:
        return "<noise key (secret)>"


def keep_noise_key(path: str | os.PathLike[str], books: Books) -> Secrets:
    """Read the key of a run that is resumed, and let the books go on in its session; or make one for a new run."""
    if not isinstance(books.event.mechanism, Banded) or books.ledger is None:
        raise ValueError(
            "[PrivacyEngine] noise_key_file must come with noise='banded' and a ledger, without which a step could be "
            "repeated under the same key, but does not"
        )
    file = os.fspath(path)
    if os.path.exists(file):
        return _resume(file, books)
    secrets = Secrets(random_key(), random_key())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "session": books.session,
        "first_step": books.steps,
        "key": secrets.key.tolist(),
        "partition": secrets.partition.tolist(),
    }
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as out:
        json.dump(content, out)
        out.flush()
        os.fsync(out.fileno())
    return secrets


def keep_shapes(path: str | os.PathLike[str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Write beside the key what parameters its noise is for, or refuse others than those that are written."""
    file, named = os.fspath(path), {name: list(shape) for name, shape in shapes.items()}
    content = json.loads(Path(file).read_text())
    if "shapes" not in content:
        temporary = f"{file}.{os.getpid()}.new"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as out:
            json.dump({**content, "shapes": named}, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    elif content["shapes"] != named:
        raise PrivacyError(f"[update] trainable parameters must be those that {file} is for but are others")


def _resume(file: str, books: Books) -> Secrets:
    if os.stat(file).st_mode & 0o077:
        raise PrivacyError(f"[PrivacyEngine] {file} must be readable by its owner alone (chmod 600) but is not")
    try:
        content = json.loads(Path(file).read_text())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it should name {FORMAT!r}, version {VERSION}")
        secrets = Secrets(*(_words(content[name]) for name in ("key", "partition")))
        session, first = int(content["session"]), int(content["first_step"])
    except (ValueError, TypeError, KeyError) as e:
        raise PrivacyError(f"[PrivacyEngine] {file} must be a noise key file but is not: {type(e).__name__}") from None
    books.resume_session(session, first)
    return secrets


def _words(values: list[int]) -> mx.array:
    if len(values) != 8 or not all(isinstance(v, int) and 0 <= v < 2**32 for v in values):
        raise ValueError
    return mx.array(values, mx.uint32)
