import base64
import hashlib
import json
import os
import warnings

import numpy as np
import pytest
from mlx_bulwark.provenance import (
    Manifest,
    ProvenanceError,
    capture_environment,
    from_croissant,
    lineage,
    sign,
    to_croissant,
    verify_environment,
)


@pytest.fixture
def chain(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    (tmp_path / "raw.csv").write_text("x\n1\n")
    (tmp_path / "clean.csv").write_text("x\n1.0\n")
    numpy.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    raw = Manifest.build(tmp_path / "raw.csv", source="survey")
    clean = Manifest.build(tmp_path / "clean.csv", parent=raw)
    return raw, clean, Manifest.build(tmp_path / "model.safetensors", parent=[clean])


def test_lineage_from_raw_data_to_a_model(chain, tmp_path):
    raw, clean, model = chain
    raw.save(tmp_path / "raw.json")
    found = lineage(model, [clean, tmp_path / "raw.json"])
    assert found.verification.ok
    assert [s.digest for s in found.steps] == [raw.digest, clean.digest, model.digest]


def test_lineage_names_what_is_missing_or_was_changed(chain):
    raw, clean, model = chain
    assert [f.kind for f in lineage(model, [clean]).verification.findings] == ["missing"]
    content = json.loads(raw.to_bytes()) | {"source": "elsewhere"}
    forged = Manifest.from_bytes((json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode())
    assert [f.kind for f in lineage(model, [clean, forged]).verification.findings] == ["changed"]


def test_a_lineage_of_a_thousand_steps():
    root = Manifest([], "sha256", hashlib.sha256().hexdigest())
    steps = [root]
    for i in range(1000):
        parents = [{"digest": steps[-1].digest, "root": root.root}]
        steps.append(Manifest([], "sha256", root.root, source=str(i), parents=parents))
    found = lineage(steps[-1], steps[:-1])
    assert found.verification.ok
    assert [s.source for s in found.steps] == [None, *map(str, range(1000))]


def test_croissant_there_and_back(chain, tmp_path):
    manifest = Manifest.build(
        [tmp_path / "raw.csv", tmp_path / "clean.csv"], licence="CC0-1.0", source="https://a.org/"
    )
    croissant = to_croissant(manifest, name="numbers", description="two of them")
    again = from_croissant(json.dumps(croissant))
    assert (again.root, again.licence, again.source) == (manifest.root, "CC0-1.0", "https://a.org/")
    (tmp_path / "raw.csv").write_text("x\n2\n")
    assert ("changed", "raw.csv") in {(f.kind, f.path) for f in again.verify(tmp_path).findings}


def test_croissant_is_valid_for_mlcroissant(chain, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlcroissant = pytest.importorskip("mlcroissant")
        manifest = Manifest.build(tmp_path / "raw.csv", licence="CC0-1.0", source="https://a.org/")
        (tmp_path / "croissant.json").write_text(json.dumps(to_croissant(manifest, name="numbers", description="one")))
        dataset = mlcroissant.Dataset(jsonld=tmp_path / "croissant.json")
    assert not dataset.metadata.ctx.issues.errors
    assert dataset.metadata.distribution[0].sha256 == manifest.files[0]["digest"]


@pytest.mark.parametrize("url", ["../a", "/a", "", 3, None])
def test_hostile_croissant_is_refused(url):
    item = {"@type": "cr:FileObject", "contentUrl": url, "contentSize": "3 B", "sha256": "0" * 64}
    with pytest.raises(ProvenanceError, match="path"):
        from_croissant({"distribution": [item]})
    for croissant in ("[" * 200_000, "{}", "[]", '{"distribution": [3]}', b"\xff"):
        with pytest.raises(ProvenanceError):
            from_croissant(croissant)


@pytest.fixture
def site(tmp_path):
    site = tmp_path / "site-packages"
    (site / "tool").mkdir(parents=True)
    (site / "tool" / "__init__.py").write_text("x = 1\n")
    info = site / "tool-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(
        f"tool/__init__.py,sha256={digest},6\ntool-1.0.dist-info/METADATA,,\ntool-1.0.dist-info/RECORD,,\n"
    )
    return site


def kinds(captured, site):
    return [(f.kind, os.path.basename(f.path)) for f in verify_environment(captured, site=[site]).findings]


def test_a_clean_environment(site, tmp_path):
    (tmp_path / "lock").write_text("tool==1.0\n")
    captured = capture_environment(lockfile=tmp_path / "lock", code=[tmp_path / "lock"], site=[site])
    assert captured["distributions"]["tool"]["version"] == "1.0"
    assert kinds(captured, site) == []
    (tmp_path / "lock").write_text("tool==2.0\n")
    assert kinds(captured, site) == [("changed", "lock")]


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("tool/__init__.py", "x = 2\n", ("changed", "__init__.py")),
        ("tool/__init__.py", None, ("missing", "__init__.py")),
        ("tool/added.py", "", ("extra", "added.py")),
        ("evil.pth", "import evil\n", ("extra", "evil.pth")),
        ("evil/deep/__init__.py", "", ("extra", "__init__.py")),
        ("tool-1.0.dist-info/METADATA", "Name: tool\nVersion: 1.1\n", ("changed", "tool")),
    ],
)
def test_poisoned_environments(site, name, content, finding):
    captured = capture_environment(site=[site])
    if content is None:
        (site / name).unlink()
    else:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    assert kinds(captured, site) == [finding]


def test_a_forged_record_is_found_by_what_was_captured(site):
    captured = capture_environment(site=[site])
    (site / "tool" / "__init__.py").write_text("x = 2\n")
    record = site / "tool-1.0.dist-info" / "RECORD"
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 2\n").digest()).rstrip(b"=").decode()
    record.write_text(f"tool/__init__.py,sha256={digest},6\n" + record.read_text().partition("\n")[2])
    assert kinds(None, site) == []
    assert kinds(captured, site) == [("changed", "tool")]


def test_sigstore_without_the_network_says_so(chain, tmp_path, monkeypatch):
    pytest.importorskip("model_signing")
    import urllib3

    def unreachable(*arguments, **options):
        raise urllib3.exceptions.HTTPError("no network here")

    monkeypatch.setattr(urllib3.PoolManager, "urlopen", unreachable)
    monkeypatch.setattr(urllib3.connectionpool.HTTPConnectionPool, "urlopen", unreachable)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chain[0].save(tmp_path / "m.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ProvenanceError, match=r"Sigstore must be reachable .* a local key needs no network"):
            sign(tmp_path / "m.json", tmp_path / "m.sig", identity_token="none")
    assert not (tmp_path / "m.sig").exists()
