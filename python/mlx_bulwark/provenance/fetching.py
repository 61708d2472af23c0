"""Downloads that are what was asked for, or nothing."""

import hashlib
import hmac
import os
import ssl
import tempfile
import urllib.error
import urllib.request
from typing import IO, Any

from .manifest import AppendsLines
from .strict_json import ProvenanceError

PIECE = 1 << 18


class _StayOnTLS(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith("https://"):
            raise ProvenanceError(f"[fetch] redirects must stay on https but one leads to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(
    url: str,
    sha256: str,
    path: str | os.PathLike[str],
    *,
    max_bytes: int = 1 << 34,
    timeout: float = 60.0,
    ssl_context: ssl.SSLContext | None = None,
    audit_log: AppendsLines | None = None,
) -> None:
    """Download a file over TLS; it appears under its name only if its digest is the one that was named.

    Args:
        url: where it is; https, also where it redirects to.
        sha256: 64 hexadecimal digits that its content must have.
        path: file to write; replaced if it is there.
        max_bytes: most bytes that are read.
        timeout: seconds without an answer.
        ssl_context: e.g. with a certificate authority of one's own. It must verify certificates and host names.
        audit_log: gets a line.

    Raises:
        ProvenanceError: the content is another or longer, a redirect leaves https, or the answer is an error.
        ValueError: the address is not https, the digest is none, or the context verifies nothing.

    Example:
        >>> fetch("http://example.org/a.csv", "0" * 64, "a.csv")
        Traceback (most recent call last):
        ValueError: [fetch] url must begin with https:// but is 'http://example.org/a.csv'
    """
    if not url.lower().startswith("https://"):
        raise ValueError(f"[fetch] url must begin with https:// but is {url!r}")
    if len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise ValueError(f"[fetch] sha256 must be 64 hexadecimal digits but is {sha256!r}")
    context = ssl_context or ssl.create_default_context()
    if context.verify_mode != ssl.CERT_REQUIRED or not context.check_hostname:
        raise ValueError("[fetch] ssl_context must verify certificates and host names but does not")
    target = os.path.abspath(path)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _StayOnTLS)
    file, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".fetch-")
    try:
        with os.fdopen(file, "wb") as out:
            size = _download(opener, url, sha256.lower(), out, max_bytes, timeout)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    if audit_log is not None:
        audit_log.append("data.fetch", url=url, sha256=sha256.lower(), bytes=size)


def _download(
    opener: urllib.request.OpenerDirector, url: str, sha256: str, out: IO[bytes], max_bytes: int, timeout: float
) -> int:
    digest, size = hashlib.sha256(), 0
    try:
        with opener.open(url, timeout=timeout) as answer:
            while piece := answer.read(min(PIECE, max_bytes - size + 1)):
                size += len(piece)
                if size > max_bytes:
                    raise ProvenanceError(f"[fetch] {url} must have at most {max_bytes} bytes but has more")
                digest.update(piece)
                out.write(piece)
    except urllib.error.URLError as e:
        raise ProvenanceError(f"[fetch] {url} must be reachable over TLS but is not: {e.reason}") from e
    if not hmac.compare_digest(digest.hexdigest(), sha256):
        raise ProvenanceError(f"[fetch] {url} must have the digest {sha256} but has {digest.hexdigest()}")
    return size
