"""Every kind of change in a tree is found and told as what it is; the tree of the tests has 10,000 files."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_bulwark.provenance import (
    Manifest,
    ProvenanceError,
    Verification,
    file_digest,
    merkle_root,
    new_key,
    read_header,
    sign,
    verify_signature,
)

FILES = 10_000


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree") / "data"
    for i in range(FILES):
        part = folder / f"part{i % 100:02d}"
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{i:05d}.txt").write_bytes(b"%d" % i)
    (folder / "part00" / "caf\u00e9.txt").write_text("composed")
    return folder


@pytest.fixture(scope="module")
def manifest(tree):
    return Manifest.build(tree, source="made up", licence="CC0-1.0")


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name * 3)
    return folder


def told(manifest, tree, **options):
    return {(f.kind, f.path) for f in manifest.verify(tree, **options).findings}


def test_a_clean_tree_has_no_findings(tree, manifest):
    result = manifest.verify(tree)
    assert result.ok
    assert result.checked == FILES + 1
    assert Manifest.build(tree, source="made up", licence="CC0-1.0").to_bytes() == manifest.to_bytes()


def test_change_of_one_byte_at_the_same_size(tree, manifest):
    path = tree / "part07" / "00107.txt"
    try:
        path.write_bytes(b"108")
        assert told(manifest, tree) == {("changed", "part07/00107.txt")}
    finally:
        path.write_bytes(b"107")


def test_truncation(tree, manifest):
    path = tree / "part07" / "00107.txt"
    try:
        path.write_bytes(b"10")
        assert told(manifest, tree) == {("changed", "part07/00107.txt")}
    finally:
        path.write_bytes(b"107")


def test_swap_names_where_the_content_belongs(tree, manifest):
    a, b = tree / "part07" / "00107.txt", tree / "part08" / "00108.txt"
    try:
        a.write_bytes(b"108")
        b.write_bytes(b"107")
        findings = manifest.verify(tree).findings
    finally:
        a.write_bytes(b"107")
        b.write_bytes(b"108")
    assert [(f.kind, f.path) for f in findings] == [("changed", "part07/00107.txt"), ("changed", "part08/00108.txt")]
    assert "part08/00108.txt" in findings[0].message


def test_added_file(tree, manifest):
    path = tree / "part07" / "new.txt"
    try:
        path.write_bytes(b"")
        assert told(manifest, tree) == {("extra", "part07/new.txt")}
    finally:
        path.unlink()


def test_removed_file(tree, manifest):
    path = tree / "part07" / "00107.txt"
    try:
        path.unlink()
        assert told(manifest, tree) == {("missing", "part07/00107.txt")}
    finally:
        path.write_bytes(b"107")


@pytest.mark.parametrize("inside", [True, False])
def test_link_in_the_place_of_a_file_with_the_same_content(tree, manifest, tmp_path, inside):
    path = tree / "part07" / "00107.txt"
    other = tree / "part07" / "00207.txt" if inside else tmp_path / "copy"
    if not inside:
        other.write_bytes(b"107")
    try:
        path.unlink()
        path.symlink_to(other.name if inside else other)
        assert told(manifest, tree) == {("link", "part07/00107.txt")}
    finally:
        path.unlink()
        path.write_bytes(b"107")


def test_link_in_the_place_of_a_folder(tree, manifest, tmp_path):
    folder, moved = tree / "part09", tmp_path / "moved"
    folder.rename(moved)
    try:
        folder.symlink_to(moved)
        findings = told(manifest, tree)
    finally:
        folder.unlink()
        moved.rename(folder)
    assert ("link", "part09") in findings
    assert len(findings) == 1 + FILES // 100


def test_case_rename(tree, manifest):
    path = tree / "part07" / "00107.txt"
    try:
        path.rename(path.with_suffix(".TXT"))
        assert told(manifest, tree) == {("case-rename", "part07/00107.TXT"), ("missing", "part07/00107.txt")}
    finally:
        path.with_suffix(".TXT").rename(path)


@pytest.mark.parametrize(
    "name", [unicodedata.normalize("NFD", "caf\u00e9.txt"), "c\u0430f\u00e9.txt", "caf\u00e9\u200b.txt"]
)
def test_unicode_twin_beside_the_file(tree, manifest, name):
    try:
        (tree / "part00" / name).write_text("composed")
        assert told(manifest, tree) == {("unicode-twin", f"part00/{name}")}
    finally:
        (tree / "part00" / name).unlink()


def test_another_schema_is_named(small, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"format": 1}')
    manifest = Manifest.build(small, schema=schema)
    assert manifest.verify(small, schema=schema) == Verification([], 3)
    (notice,) = manifest.verify(small).notices
    assert (notice.kind, manifest.verify(small).ok) == ("schema", True)
    assert manifest.schema in notice.message
    schema.write_text('{"format": 2}')
    (finding,) = manifest.verify(small, schema=schema).findings
    assert (finding.kind, finding.path) == ("schema", str(schema))
    assert "another schema" in finding.message
    (finding,) = manifest.verify(small, schema=tmp_path / "gone").findings
    assert "could not be read" in finding.message
    (finding,) = Manifest.build(small).verify(small, schema=schema).findings
    assert "names no schema" in finding.message


def test_another_git_commit_is_a_notice_or_by_choice_a_finding(small):
    def commit():
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "a"], cwd=small, check=True)

    if shutil.which("git") is None:
        pytest.skip("no git")
    subprocess.run(["git", "init", "-q"], cwd=small, check=True)
    commit()
    manifest = Manifest.build(small, ignore=[".git"])
    assert manifest.verify(small, same_commit=True) == Verification([], 3)
    commit()
    found = manifest.verify(small)
    assert (found.ok, [n.kind for n in found.notices]) == (True, ["git-commit"])
    assert manifest.git_commit in found.notices[0].message
    found = manifest.verify(small, same_commit=True)
    assert ([f.kind for f in found.findings], found.notices) == (["git-commit"], [])
    shutil.rmtree(small / ".git")
    assert "there is no checkout" in manifest.verify(small).notices[0].message


def test_special_files_are_told_without_waiting_for_them(small):
    manifest = Manifest.build(small)
    (small / "a").unlink()
    os.mkfifo(small / "a")
    assert told(manifest, small) == {("special", "a")}
    with pytest.raises(ProvenanceError, match="must be a regular file but is a pipe"):
        Manifest.build(small)


def test_build_refuses_links_that_leave_the_root(small, tmp_path):
    (tmp_path / "outside").write_text("x")
    (small / "link").symlink_to("../outside")
    with pytest.raises(ProvenanceError, match="must stay below"):
        Manifest.build(small)


def test_links_within_the_root_are_written_down(small):
    (small / "link").symlink_to("a")
    manifest = Manifest.build(small)
    assert manifest.verify(small).ok
    (small / "link").unlink()
    (small / "link").symlink_to("b")
    assert told(manifest, small) == {("link", "link")}


def test_names_that_are_not_utf8_are_refused(small):
    with open(os.path.join(os.fsencode(small), b"bad\xff"), "wb"):
        pass
    with pytest.raises(ProvenanceError, match="must be UTF-8"):
        Manifest.build(small)


def test_twins_are_warned_of(small):
    (small / "A").write_text("other")
    with pytest.warns(UserWarning, match="look the same"):
        Manifest.build(small)


def test_ignored_paths_are_of_one_verification_alone(small):
    manifest = Manifest.build(small)
    (small / "a").write_text("changed")
    assert manifest.verify(small, ignore=["a"]).ok
    assert told(manifest, small) == {("changed", "a")}


def test_cache_is_believed_only_where_nothing_moved(small, tmp_path):
    cache = tmp_path / "cache"
    for name in "abc":
        os.utime(small / name, ns=(10**18, 10**18))
    manifest = Manifest.build(small, cache=cache)
    content = (small / "a").read_bytes()
    (small / "a").write_bytes(content[::-1][:-1] + b"!")
    os.utime(small / "a", ns=(10**18, 10**18))  # the time of change gives it away
    assert told(manifest, small, cache=cache) == {("changed", "a")}


def test_an_interrupted_build_goes_on_from_its_cache(small, tmp_path, monkeypatch):
    from mlx_bulwark.provenance import hashing

    monkeypatch.setattr(hashing, "RACY", -(10**12))
    cache, read = tmp_path / "cache", []
    digest = hashing._digest

    def interrupted(path, *rest):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(path)
        return digest(path, *rest)

    monkeypatch.setattr(hashing, "_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Manifest.build(small, cache=cache, threads=1)
    with cache.open("ab") as f:
        f.write(b'["torn')
    monkeypatch.setattr(hashing, "_digest", lambda path, *rest: read.append(path) or digest(path, *rest))
    manifest = Manifest.build(small, cache=cache, threads=1)
    assert len(read) == 3
    assert manifest.to_bytes() == Manifest.build(small).to_bytes()


def test_parallel_and_single_agree(small):
    assert Manifest.build(small, threads=1).to_bytes() == Manifest.build(small, threads=4).to_bytes()


def test_several_paths_have_a_root_in_common(tmp_path):
    for name in ("x/one", "y/two"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    manifest = Manifest.build([tmp_path / "x", tmp_path / "y" / "two"])
    assert [e["path"] for e in manifest.files] == ["x/one", "y/two"]
    assert manifest.verify(tmp_path).ok
    with pytest.raises(ProvenanceError, match="must lie below root"):
        Manifest.build(tmp_path / "x", root=tmp_path / "y")


def test_diff(small):
    old = Manifest.build(small)
    (small / "a").write_text("changed")
    (small / "b").rename(small / "renamed")
    (small / "c").unlink()
    (small / "d").write_text("new")
    diff = old.diff(Manifest.build(small))
    assert diff == (["d"], ["c"], ["a"], [("b", "renamed")])


# --- published vectors -------------------------------------------------------------------------------------------

RFC_6962_LEAVES = [
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
]  # fmt: skip
RFC_6962_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]  # the test vectors of certificate-transparency


@pytest.mark.parametrize("count", range(1, 9))
def test_merkle_root_of_certificate_transparency(count):
    assert merkle_root([bytes.fromhex(leaf) for leaf in RFC_6962_LEAVES[:count]]) == RFC_6962_ROOTS[count - 1]


def recursive_root(leaves):
    """RFC 6962, section 2.1, as it is written."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    k = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\1" + recursive_root(leaves[:k]) + recursive_root(leaves[k:])).digest()


@given(st.lists(st.binary(max_size=8), max_size=70))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_merkle_root_is_that_of_the_recursion(leaves):
    assert merkle_root(leaves) == recursive_root(leaves).hex()


def test_sha256_and_blake3_vectors(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "251").write_bytes(bytes(i % 251 for i in range(102400)))
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    pytest.importorskip("blake3")
    blake3 = {  # of the reference implementation's test_vectors.json
        "empty": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        "251": "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
    }
    for name, digest in blake3.items():
        assert file_digest(tmp_path / name, "blake3") == digest
    folder = tmp_path
    assert Manifest.build(folder, algorithm="blake3").verify(folder).ok


# --- hostile manifests -------------------------------------------------------------------------------------------


def with_path(small, path):
    content = json.loads(Manifest.build(small).to_bytes())
    content["files"][0]["path"] = path
    return canonical(content)


def canonical(content):
    from mlx_bulwark.provenance.strict_json import encode

    return encode(content, indent=1)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../a", "must stay below"),
        ("x/../../a", "must stay below"),
        ("/etc/passwd", "is absolute"),
        ("./a", "must stay below"),
        ("a//b", "must stay below"),
        ("", "must be a name"),
        (7, "must be a name"),
        (None, "must be a name"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(small, path, reason):
    with pytest.raises(ProvenanceError, match=reason):
        Manifest.from_bytes(with_path(small, path))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"[]\n", "it should name"),
        (b'{\n "a": 1,\n "a": 1\n}\n', "twice"),
        (b'{\n "a": ' + b"9" * 5000 + b"\n}\n", "5000 digits"),
        (b'{\n "a": 1e999\n}\n', "too large"),
        (b'{\n "a": NaN\n}\n', "NaN"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{\n "a\0": 1\n}\n', "NUL"),
        (b'{\n "a": "\\u0000"\n}\n', "it should name"),
        (b'{\n "a": "\xff"\n}\n', "utf-8"),
        (b'{\n "a": "\\ud800"\n}\n', "surrogates|utf-8"),
        (b'{"a": 1}', "bytes are not those"),
    ],
)
def test_hostile_json_is_refused_with_the_reason(raw, reason):
    with pytest.raises(ProvenanceError, match=reason):
        Manifest.from_bytes(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(json.loads(Manifest([], "sha256", merkle_root([])).to_bytes()))


@given(name=st.sampled_from(NAMES), value=JSON)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_value_in_any_field_is_taken_or_refused(name, value):
    content = json.loads(Manifest([], "sha256", merkle_root([])).to_bytes())
    content[name] = value
    try:
        raw = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return
    try:
        again = Manifest.from_bytes(raw)
    except ProvenanceError:
        return
    assert again.to_bytes() == raw


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_bytes_are_refused_as_manifest(raw):
    with pytest.raises(ProvenanceError):
        Manifest.from_bytes(raw)


# --- edits of manifest and signature -----------------------------------------------------------------------------


def edits(raw, count, seed):
    """Bytes that were replaced, put in or taken out at random."""
    rng = random.Random(seed)
    while count:
        i, kind, byte = rng.randrange(len(raw)), rng.randrange(3), bytes([rng.randrange(256)])
        edited = [raw[:i] + byte + raw[i + 1 :], raw[:i] + byte + raw[i:], raw[:i] + raw[i + 1 :]][kind]
        if edited != raw:
            count -= 1
            yield edited


@pytest.fixture
def signed(small, tmp_path):
    pytest.importorskip("model_signing")
    pytest.importorskip("OpenSSL")
    Manifest.build(small, source="here").save(tmp_path / "manifest.json")
    new_key(tmp_path / "key")
    sign(tmp_path / "manifest.json", tmp_path / "manifest.sig", key=tmp_path / "key")
    return tmp_path


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_1000_random_edits_break_the_signature(signed, name):
    raw, missed = (signed / name).read_bytes(), 0
    verify_signature(signed / "manifest.json", signed / "manifest.sig", key=signed / "key.pub")
    for edited in edits(raw, 1000, seed=1):
        (signed / name).write_bytes(edited)
        try:
            verify_signature(signed / "manifest.json", signed / "manifest.sig", key=signed / "key.pub")
            missed += 1
        except ProvenanceError:
            pass
    assert missed == 0


def test_another_key_is_refused(signed):
    new_key(signed / "other")
    with pytest.raises(ProvenanceError, match="must be what was signed"):
        verify_signature(signed / "manifest.json", signed / "manifest.sig", key=signed / "other.pub")


def test_keys_that_others_can_read_are_refused(signed):
    assert os.stat(signed / "key").st_mode & 0o777 == 0o600
    os.chmod(signed / "key", 0o644)
    with pytest.raises(ProvenanceError, match="chmod 600"):
        sign(signed / "manifest.json", signed / "again.sig", key=signed / "key")


def test_manifest_edits_are_found_without_a_signature_where_they_concern_files(small):
    raw = Manifest.build(small).to_bytes()
    start, end = raw.index(b'"files"'), raw.index(b'"format"')
    for edited in edits(raw[start:end], 300, seed=2):
        with pytest.raises(ProvenanceError):
            Manifest.from_bytes(raw[:start] + edited + raw[end:])


# --- model files -------------------------------------------------------------------------------------------------


def test_safetensors_headers_are_read_without_trust(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    numpy.save_file({"w": np.zeros((3, 5), np.float32)}, path, metadata={"base": "none"})
    assert read_header(path) == {"tensors": 1, "bytes": 60, "metadata": {"base": "none"}}
    manifest = Manifest.build(path)
    assert manifest.files[0]["safetensors"]["metadata"] == {"base": "none"}
    assert manifest.verify(tmp_path).ok


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 8,
        (10).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (31).to_bytes(8, "little") + b'{"a":{"data_offsets":[0,99999]}}',
        (24).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}',
    ],
)
def test_hostile_safetensors_are_refused(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ProvenanceError, match="header"):
        Manifest.build(path)
