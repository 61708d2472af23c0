"""From raw data to a trained model: manifests that name their parents by digest."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from .manifest import Finding, Manifest, Verification


@dataclass(frozen=True)
class Lineage:
    """Manifests from the oldest to the one that was asked for.

    Attributes:
        steps: each manifest behind its parents.
        verification: parents that are not among the manifests that were given, or are not what they were.
    """

    steps: list[Manifest]
    verification: Verification


def lineage(manifest: Manifest, ancestors: Iterable[Manifest | str | os.PathLike[str]]) -> Lineage:
    """Follow the parents of a manifest to the raw data, and verify each link by its digest.

    Args:
        manifest: of the newest step, such as a trained model.
        ancestors: manifests of the steps before, or their files, in any order.

    Returns:
        The steps, and what is missing among them.

    Raises:
        ProvenanceError: a file is no manifest.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("raw", "clean"):
        ...     _ = (folder / name).write_text(name)
        >>> raw = Manifest.build(folder / "raw", source="survey")
        >>> clean = Manifest.build(folder / "clean", parent=raw)
        >>> [step.source for step in lineage(clean, [raw]).steps]
        ['survey', None]
        >>> lineage(clean, []).verification.ok
        False
    """
    given = [a if isinstance(a, Manifest) else Manifest.load(a) for a in ancestors]
    known = {a.digest: a for a in given}
    by_root = {a.root: a for a in given}
    steps: dict[str, Manifest] = {}
    findings: dict[str, Finding] = {}
    # Each manifest is put down twice: first to bring its parents before it, then to take its place.
    stack = [(manifest, False)]
    while stack:
        step, has_parents = stack.pop()
        digest = step.digest
        if has_parents:
            steps.setdefault(digest, step)
            continue
        stack.append((step, True))
        for parent in reversed(step.parents):
            found = known.get(parent["digest"])
            if found is not None and found.digest not in steps:
                stack.append((found, False))
            elif found is None and parent["root"] in by_root:
                message = "its files are those that were named, but what it says of them was changed"
                findings[parent["digest"]] = Finding("changed", parent["digest"], message)
            elif found is None:
                message = "a manifest names it as its parent, but it is not there"
                findings[parent["digest"]] = Finding("missing", parent["digest"], message)
            elif found.root != parent["root"]:
                message = "its Merkle root is not the one that is named"
                findings[parent["digest"]] = Finding("changed", parent["digest"], message)
    return Lineage(list(steps.values()), Verification(list(findings.values()), len(steps)))
