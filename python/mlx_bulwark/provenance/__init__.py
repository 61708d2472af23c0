"""Where data and models came from, whether they are still what they were, and who did what with them.

`Manifest` holds digests of a tree of files and verifies it; `sign` and `verify_signature` sign it. `AuditLog` is an
append-only log in a hash chain. `fetch`, `capture_environment`, `lineage` and Croissant are built on them.
"""

from .audit_log import AuditLog, Head, LogVerification
from .croissant import from_croissant, to_croissant
from .environment import capture_environment, verify_environment
from .fetching import fetch
from .hashing import file_digest, merkle_root
from .keys import new_key
from .lineage import Lineage, lineage
from .manifest import Diff, Finding, Manifest, Verification
from .safetensors_header import read_header
from .signing import sign, verify_signature
from .strict_json import ProvenanceError

__all__ = [
    "AuditLog",
    "Diff",
    "Finding",
    "Head",
    "Lineage",
    "LogVerification",
    "Manifest",
    "ProvenanceError",
    "Verification",
    "capture_environment",
    "fetch",
    "file_digest",
    "from_croissant",
    "lineage",
    "merkle_root",
    "new_key",
    "read_header",
    "sign",
    "to_croissant",
    "verify_environment",
    "verify_signature",
]
