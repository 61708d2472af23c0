"""The one key that outlives its engine: that of correlated noise, in a file of its own.

Who has it subtracts the noise. Under it no step may happen twice, which only a ledger can promise. Of several ranks
each has a key and a file of its own, and all go on together or not at all.
"""

import json
import os
import secrets as tokens
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..ops.noise import random_key
from .books import Books
from .distributed import Ranks
from .events import Banded
from .taps import PrivacyError

FORMAT, VERSION = "mlx-bulwark noise key, secret", 1


class Secrets(NamedTuple):
    """Key of the noise, and seed of the sampling scheme's partition."""

    key: mx.array
    partition: mx.array

    def __repr__(self) -> str:
        return "<noise key (secret)>"


def own_file(path: str | os.PathLike[str], ranks: Ranks | None) -> str:
    """The file of this rank: its number follows the name, also where ranks share a disk."""
    return f"{os.fspath(path)}.{ranks.rank}" if ranks else os.fspath(path)


def keep_noise_key(path: str | os.PathLike[str], books: Books, ranks: Ranks | None) -> Secrets:
    """Read the key of a run that is resumed, and let the books go on in its session; or make one for a new run."""
    file, has_ledger = own_file(path, ranks), books.ledger is not None
    if not ranks:
        return _keep(file, books, has_ledger, os.path.exists(file), {"run": tokens.token_hex(8), "ranks": 1})[0]
    has_ledger, run = ranks.from_first([has_ledger, tokens.token_hex(8)])
    there = ranks.from_all(os.path.exists(file))
    if any(there) and not all(there):
        raise PrivacyError(
            f"[PrivacyEngine] noise_key_file must be there on all ranks or on none but {file} is not like the others: "
            f"there on ranks {[rank for rank, is_there in enumerate(there) if is_there]}"
        )
    ours = {"run": run, "ranks": ranks.size}
    secrets, found = ranks.together(lambda: _keep(file, books, has_ledger, all(there), ours))
    ranks.agree("runs of the noise key files", found)
    return secrets


def _keep(
    file: str, books: Books, has_ledger: bool, resumes: bool, ours: dict[str, Any]
) -> tuple[Secrets, tuple[Any, ...]]:
    """Secrets of this process, and what must be the same on all ranks."""
    if not isinstance(books.event.mechanism, Banded) or not has_ledger:
        raise ValueError(
            "[PrivacyEngine] noise_key_file must come with noise='banded' and a ledger, without which a step could be "
            "repeated under the same key, but does not"
        )
    if resumes:
        return _resume(file, books, ours["ranks"])
    secrets = Secrets(random_key(), random_key())
    content = {
        **ours,
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
    return secrets, (ours["run"],)


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


def _resume(file: str, books: Books, ranks: int) -> tuple[Secrets, tuple[Any, ...]]:
    if os.stat(file).st_mode & 0o077:
        raise PrivacyError(f"[PrivacyEngine] {file} must be readable by its owner alone (chmod 600) but is not")
    try:
        content = json.loads(Path(file).read_text())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it should name {FORMAT!r}, version {VERSION}")
        secrets = Secrets(*(_words(content[name]) for name in ("key", "partition")))
        session, first = int(content["session"]), int(content["first_step"])
        run, of_ranks = str(content["run"]), int(content["ranks"])
    except (ValueError, TypeError, KeyError) as e:
        raise PrivacyError(f"[PrivacyEngine] {file} must be a noise key file but is not: {type(e).__name__}") from None
    if of_ranks != ranks:
        raise PrivacyError(
            f"[PrivacyEngine] ranks must be {of_ranks}, as in {file}, but are {ranks}: each has its share of the noise"
        )
    if "shapes" in content and books.steps == first:
        raise PrivacyError(
            f"[PrivacyEngine] ledger must hold the steps that were taken under {file} but holds none of them: their "
            "noise would be repeated"
        )
    books.resume_session(session, first)
    return secrets, (run, session, first)


def _words(values: list[int]) -> mx.array:
    if len(values) != 8 or not all(isinstance(v, int) and 0 <= v < 2**32 for v in values):
        raise ValueError
    return mx.array(values, mx.uint32)
