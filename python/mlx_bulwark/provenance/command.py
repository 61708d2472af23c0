"""The commands ``mlx-bulwark manifest`` and ``mlx-bulwark log``."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from .audit_log import AuditLog, lines
from .environment import capture_environment, verify_environment
from .manifest import Finding, Manifest, Verification
from .signing import sign, verify_signature
from .strict_json import ProvenanceError

if TYPE_CHECKING:
    import typer

MANIFEST_HELP = """Write down what files hold, sign it, and find what changed.

Exit codes: 0 all is as it was, 1 something is not, or a file cannot be read or written, 2 misuse."""
LOG_HELP = """Verify and read audit logs.

Exit codes: 0 consistent, 1 it is not, or a file cannot be read or written, 2 misuse."""
_JSON_HELP = "Print JSON and nothing else."


def add_commands(app: "typer.Typer") -> None:
    """Add both groups to the command line."""
    app.add_typer(_manifest_app(), name="manifest")
    app.add_typer(_log_app(), name="log")


def _manifest_app() -> "typer.Typer":
    import typer

    app = typer.Typer(help=MANIFEST_HELP, no_args_is_help=True)
    as_json = typer.Option("--json", help=_JSON_HELP)
    bar = typer.Option("--progress", help="Show a bar.")
    log = typer.Option(metavar="FILE", help="Audit log that gets a line.", show_default=False)

    @app.command(help="Hash the files below PATHS and write their manifest.")
    def build(
        paths: Annotated[list[Path], typer.Argument(metavar="PATHS...", help="A folder, or files.")],
        out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
        source: Annotated[str | None, typer.Option(help="Where the data came from.", show_default=False)] = None,
        licence: Annotated[str | None, typer.Option(help="Its licence.", show_default=False)] = None,
        parent: Annotated[
            list[Path] | None,
            typer.Option(metavar="FILE", help="Manifest this was made from; may repeat.", show_default=False),
        ] = None,
        root: Annotated[Path | None, typer.Option(help="Folder paths are told from.", show_default=False)] = None,
        algorithm: Annotated[str, typer.Option(metavar="sha256|blake3", help="Of the digests.")] = "sha256",
        schema: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Schema the data was checked against.", show_default=False)
        ] = None,
        ignore: Annotated[
            list[str] | None, typer.Option(help="Path to leave out; may repeat.", show_default=False)
        ] = None,
        environment: Annotated[bool, typer.Option("--environment", help="Write down what is installed.")] = False,
        lockfile: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Lockfile of the environment.", show_default=False)
        ] = None,
        code: Annotated[
            list[Path] | None,
            typer.Option(metavar="FILE", help="File of the preprocessing; may repeat.", show_default=False),
        ] = None,
        cache: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Digests of unchanged files; resumes.", show_default=False),
        ] = None,
        audit_log: Annotated[Path | None, log] = None,
        progress: Annotated[bool, bar] = False,
        json: Annotated[bool, as_json] = False,
    ) -> None:
        def run() -> tuple[dict[str, Any], list[str], bool]:
            captured = environment or lockfile is not None or code
            manifest = Manifest.build(
                list(paths),
                source=source,
                licence=licence,
                parent=[Manifest.load(p) for p in parent or []],
                root=root,
                algorithm=algorithm,
                schema=schema,
                ignore=ignore or [],
                environment=capture_environment(lockfile=lockfile, code=code or []) if captured else None,
                progress=progress,
                cache=cache,
                audit_log=_log(audit_log),
            )
            manifest.save(out)
            told = {"manifest": str(out), "digest": manifest.digest, "root": manifest.root}
            words = [f"manifest   {out}", f"files      {len(manifest.files):,}", f"root       {manifest.root}"]
            return told | {"files": len(manifest.files)}, words, True

        _answer(run, json)

    @app.command(help="Compare the files below ROOT with a manifest.")
    def verify(
        manifest: Annotated[Path, typer.Argument(metavar="MANIFEST")],
        root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder paths are told from.")],
        signature: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Signature of the manifest.", show_default=False)
        ] = None,
        key: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Public key of the signature.", show_default=False)
        ] = None,
        identity: Annotated[str | None, typer.Option(help="Who signed by Sigstore.", show_default=False)] = None,
        oidc_issuer: Annotated[str | None, typer.Option(help="Who vouches for it.", show_default=False)] = None,
        schema: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Schema the data is held against now.", show_default=False)
        ] = None,
        same_commit: Annotated[
            bool, typer.Option("--same-commit", help="Another git commit is a finding, not a notice.")
        ] = False,
        environment: Annotated[bool, typer.Option("--environment", help="Verify what is installed too.")] = False,
        ignore: Annotated[
            list[str] | None, typer.Option(help="Further path to leave out; may repeat.", show_default=False)
        ] = None,
        cache: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Believe its digests.", show_default=False)
        ] = None,
        audit_log: Annotated[Path | None, log] = None,
        progress: Annotated[bool, bar] = False,
        json: Annotated[bool, as_json] = False,
    ) -> None:
        if signature is None and (key is not None or identity is not None):
            _misuse("--key and --identity want --signature")
        if signature is not None and key is None and (identity is None or oidc_issuer is None):
            _misuse("--signature wants --key, or --identity and --oidc-issuer")

        def run() -> tuple[dict[str, Any], list[str], bool]:
            if signature is not None:
                verify_signature(manifest, signature, key=key, identity=identity, oidc_issuer=oidc_issuer)
            content, written_to = Manifest.load(manifest), _log(audit_log)
            found = content.verify(
                root,
                schema=schema,
                same_commit=same_commit,
                ignore=ignore or [],
                progress=progress,
                cache=cache,
                audit_log=written_to,
            )
            if environment:
                also = verify_environment(content.environment, progress=progress, audit_log=written_to)
                found = Verification(found.findings + also.findings, found.checked + also.checked, found.notices)
            words = [_line(f) for f in found.findings] + [f"notice: {_line(f)}" for f in found.notices]
            words.append(f"{len(found.findings):,} findings in {found.checked:,} files")
            signed = None if signature is None else f"verified, by {key or identity}"
            return {**found.to_json(), **_origin(content), "signature": signed}, words, found.ok

        _answer(run, json)

    @app.command(name="sign", help="Sign a manifest, by a local key or through Sigstore.")
    def sign_manifest(
        manifest: Annotated[Path, typer.Argument(metavar="MANIFEST")],
        out: Annotated[Path, typer.Option(metavar="FILE", help="Signature to write.")],
        key: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="ECDSA key. Default: Sigstore.", show_default=False),
        ] = None,
        new: Annotated[bool, typer.Option("--new-key", help="Make the key first, and its .pub.")] = False,
        json: Annotated[bool, as_json] = False,
    ) -> None:
        if new and key is None:
            _misuse("--new-key wants --key")

        def run() -> tuple[dict[str, Any], list[str], bool]:
            from .keys import new_key

            Manifest.load(manifest)
            if new and key is not None:
                new_key(key)
            sign(manifest, out, key=key)
            return {"signature": str(out)}, [f"signature  {out}"], True

        _answer(run, json)

    @app.command(help="Tell what changed from the manifest OLD to NEW.")
    def diff(
        old: Annotated[Path, typer.Argument(metavar="OLD")],
        new: Annotated[Path, typer.Argument(metavar="NEW")],
        json: Annotated[bool, as_json] = False,
    ) -> None:
        def run() -> tuple[dict[str, Any], list[str], bool]:
            found = Manifest.load(old).diff(Manifest.load(new))
            words = [f"{mark} {path!r}" for mark, some in zip("+-~", found[:3], strict=True) for path in some]
            words += [f"> {a!r} to {b!r}" for a, b in found.renamed]
            return found._asdict(), words, not any(found)

        _answer(run, json)

    return app


def _log_app() -> "typer.Typer":
    import typer

    app = typer.Typer(help=LOG_HELP, no_args_is_help=True)
    as_json = typer.Option("--json", help=_JSON_HELP)
    file = typer.Argument(metavar="LOG")

    @app.command(help="Find every edit, deletion and reordering; with --anchor also truncation and rewriting.")
    def verify(
        log: Annotated[Path, file],
        anchor: Annotated[
            Path | None, typer.Option(metavar="FILE", help="A head that was kept elsewhere.", show_default=False)
        ] = None,
        key: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Key the anchor is signed by.", show_default=False)
        ] = None,
        json: Annotated[bool, as_json] = False,
    ) -> None:
        if key is not None and anchor is None:
            _misuse("--key wants --anchor")

        def run() -> tuple[dict[str, Any], list[str], bool]:
            found = AuditLog.verify(log, anchor=anchor, key=key)
            words = [*found.findings, f"{found.head.count:,} lines: {found.verdict}"]
            if found.torn:
                words.insert(-1, f"the last {found.torn} bytes are a torn line, which nobody was told is written")
            return found.to_json(), words, found.ok

        _answer(run, json)

    @app.command(help="Print the lines of a log that is consistent.")
    def show(log: Annotated[Path, file], json: Annotated[bool, as_json] = False) -> None:
        def run() -> tuple[dict[str, Any], list[str], bool]:
            found = AuditLog.verify(log)
            rows = [line for line in lines(log) if "kind" in line] if found.ok else []
            words = [f"{r['n']:>6} {r['time']} {r['kind']} {r['fields']}" for r in rows]
            return {"lines": rows, **found.to_json()}, [*words, *found.findings, found.verdict], found.ok

        _answer(run, json)

    @app.command(help="Write the head of a log, signed by KEY, to be kept elsewhere as an anchor.")
    def head(
        log: Annotated[Path, file],
        key: Annotated[Path, typer.Option(metavar="FILE", help="Ed25519 or HMAC key.")],
        out: Annotated[Path, typer.Option(metavar="FILE", help="Anchor to write.")],
        new: Annotated[
            str | None, typer.Option("--new-key", metavar="ed25519|hmac", help="Make the key first.")
        ] = None,
        json: Annotated[bool, as_json] = False,
    ) -> None:
        if new not in (None, "ed25519", "hmac"):
            _misuse(f"--new-key must be ed25519 or hmac but is {new}")

        def run() -> tuple[dict[str, Any], list[str], bool]:
            from .keys import new_key
            from .strict_json import encode

            if not log.exists():
                raise FileNotFoundError(2, os.strerror(2), str(log))
            if new is not None:
                new_key(key, "hmac" if new == "hmac" else "ed25519")
            signed = AuditLog(log).signed_head(key)
            out.write_bytes(encode(signed))
            return signed, [f"anchor     {out}"], True

        _answer(run, json)

    return app


def _origin(manifest: Manifest) -> dict[str, Any]:
    """Where the files come from, as the manifest tells it."""
    return {name: getattr(manifest, name) for name in ("root", "source", "licence", "git_commit", "parents")}


def _log(path: Path | None) -> AuditLog | None:
    return None if path is None else AuditLog(path)


def _line(finding: Finding) -> str:
    return f"{finding.kind:<13} {f'{finding.path!r}: ' if finding.path else ''}{finding.message}"


def _misuse(message: str) -> NoReturn:
    print(f"mlx-bulwark: {message}", file=sys.stderr)
    sys.exit(2)


def _answer(run: Callable[[], tuple[dict[str, Any], list[str], bool]], as_json: bool) -> None:
    """Run, print, and exit: 1 on findings, on what is refused and where a file cannot be used, 2 on misuse."""
    try:
        told, words, ok = run()
    except (ProvenanceError, ImportError) as e:
        told, words, ok = {"ok": False, "error": str(e)}, [], False
        print(f"mlx-bulwark: {e}", file=sys.stderr)
    except OSError as e:
        told, words, ok = {"ok": False, "error": str(e)}, [], False
        print(f"mlx-bulwark: {e.filename}: {e.strerror or e}", file=sys.stderr)
    except ValueError as e:
        print(f"mlx-bulwark: {e}", file=sys.stderr)
        sys.exit(2)
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(words).encode(errors="backslashreplace").decode(), end="\n" if words else "")
    sys.exit(not ok)
