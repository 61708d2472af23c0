"""Manifests as Croissant metadata of data sets (JSON-LD), and back."""

import json
from typing import Any

from .hashing import merkle_root
from .manifest import Manifest
from .strict_json import ProvenanceError, encode
from .tree import check_path

MAX_BYTES = 1 << 28
CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FORMATS = {
    "csv": "text/csv",
    "json": "application/json",
    "jsonl": "application/jsonlines",
    "parquet": "application/x-parquet",
    "png": "image/png",
    "jpg": "image/jpeg",
    "txt": "text/plain",
    "zip": "application/zip",
}


def to_croissant(manifest: Manifest, *, name: str, description: str | None = None) -> dict[str, Any]:
    """Describe the files of a manifest as a Croissant data set.

    Args:
        manifest: with SHA-256 digests. Links are left out: Croissant has no word for them.
        name: of the data set.
        description: what it is.

    Returns:
        JSON-LD for ``json.dumps``.

    Raises:
        ValueError: digests are of another algorithm.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.csv")
        >>> _ = path.write_text("x\\n1\\n")
        >>> manifest = Manifest.build(path, licence="CC0-1.0")
        >>> found = to_croissant(manifest, name="numbers")
        >>> found["distribution"][0]["contentUrl"]
        'a.csv'
        >>> from_croissant(found).root == manifest.root
        True

    Source: Croissant 1.0, https://docs.mlcommons.org/croissant/docs/croissant-spec.html.
    """
    if manifest.algorithm != "sha256":
        raise ValueError(f"[to_croissant] algorithm must be sha256 but is {manifest.algorithm}")
    content: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": name,
        "distribution": [_file(entry) for entry in manifest.files if "digest" in entry],
    }
    further = {"description": description, "license": manifest.licence, "url": manifest.source}
    return content | {k: v for k, v in further.items() if v is not None}


def _file(entry: dict[str, Any]) -> dict[str, Any]:
    path = entry["path"]
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "contentSize": f"{entry['size']} B",
        "encodingFormat": _FORMATS.get(path.rpartition(".")[2].lower(), "application/octet-stream"),
        "sha256": entry["digest"],
    }


def from_croissant(croissant: dict[str, Any] | str | bytes) -> Manifest:
    """Take digests out of Croissant metadata, so that a folder can be verified by them.

    Args:
        croissant: JSON-LD with relative ``contentUrl``, ``sha256`` and ``contentSize`` in bytes for each file.

    Returns:
        A manifest without parents.

    Raises:
        ProvenanceError: a file has no usable digest, size or path.
    """
    try:
        if isinstance(croissant, (str, bytes)) and len(croissant) > MAX_BYTES:
            raise ProvenanceError(f"it has more than {MAX_BYTES} bytes")
        content: Any = json.loads(croissant) if isinstance(croissant, (str, bytes)) else croissant
        entries = [_entry(f) for f in content["distribution"] if _is_file(f)]
        licence, source = (content.get(k) for k in ("license", "url"))
        entries.sort(key=lambda entry: str(entry["path"]).encode())
        root = merkle_root([encode(entry) for entry in entries])
        manifest = Manifest(entries, "sha256", root, _text(source), _text(licence))
        return Manifest.from_bytes(manifest.to_bytes(), "croissant")
    except RecursionError:
        raise ProvenanceError("[from_croissant] croissant must be Croissant but is nested too deeply") from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        why = e if isinstance(e, ValueError) else f"{type(e).__name__} {e}"
        raise ProvenanceError(f"[from_croissant] croissant must describe files but does not: {why}") from None


def _is_file(item: dict[str, Any]) -> bool:
    return str(item.get("@type", "")).rpartition(":")[2].rpartition("/")[2] == "FileObject"


def _entry(item: dict[str, Any]) -> dict[str, Any]:
    path = check_path(item["contentUrl"])
    number, _, unit = str(item["contentSize"]).partition(" ")
    if unit not in ("", "B") or not number.isascii() or not number.isdigit() or len(number) > 20:
        raise ProvenanceError(f"contentSize of {path!r} must be in bytes but is {item['contentSize']!r}")
    return {"path": path, "digest": item["sha256"], "size": int(number)}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
