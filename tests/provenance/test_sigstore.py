"""Signatures through Sigstore, with model-signing's own code over stand-ins for what the network does."""

import hashlib
import hmac
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("model_signing")
pytest.importorskip("sigstore")

from mlx_bulwark.provenance import Manifest, ProvenanceError, sign, verify_signature
from model_signing._signing import sign_sigstore as online

SIGNER = {"identity": "ann@example.org", "oidc_issuer": "https://issuer.example"}


class Bundle:
    """Content, who signed it, and a seal that only Sigstore can make."""

    def __init__(self, content, who, seal):
        self.content, self.who, self.seal = content, who, seal

    def to_json(self):
        return json.dumps([self.content.decode(), self.who, self.seal])

    @classmethod
    def from_json(cls, text):
        content, who, seal = json.loads(text)
        return cls(content.encode(), who, seal)


def sealed(content, who):
    return hmac.new(b"Sigstore", content + who.encode(), hashlib.sha256).hexdigest()


class Service:
    """What is asked of Sigstore: a token, a signature for it, and whether a bundle holds."""

    ambient = None

    def __init__(self, asked):
        self.asked = asked

    def credential(self, client):
        self.asked.append("ambient")
        return self.ambient

    def browser(self, **options):
        self.asked.append("browser")
        return "ann@example.org"

    def signer(self, token):
        self.asked.append(token)

        class Signer:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

            def sign_dsse(self, statement):
                who = f"{token} {SIGNER['oidc_issuer']}"
                return Bundle(statement._contents, who, sealed(statement._contents, who))

        return Signer()

    def verify_dsse(self, bundle, policy):
        if bundle.seal != sealed(bundle.content, bundle.who):
            raise ValueError("the seal is broken")
        if bundle.who != policy:
            raise ValueError(f"signed by {bundle.who}")
        return "application/vnd.in-toto+json", bundle.content


@pytest.fixture
def service(monkeypatch):
    made = Service([])
    trust = SimpleNamespace(signing_config=SimpleNamespace(get_oidc_url=lambda: "url"), trusted_root=None)
    monkeypatch.setattr(
        online,
        "sigstore_models",
        SimpleNamespace(ClientTrustConfig=SimpleNamespace(production=lambda: trust), Bundle=Bundle),
    )
    oidc = SimpleNamespace(
        Issuer=lambda url: SimpleNamespace(identity_token=made.browser),
        IdentityToken=lambda token, client: token,
        detect_credential=made.credential,
    )
    monkeypatch.setattr(online, "sigstore_oidc", oidc)
    context = SimpleNamespace(SigningContext=SimpleNamespace(from_trust_config=lambda trust: made))
    monkeypatch.setattr(online, "sigstore_signer", context)
    policy = SimpleNamespace(Identity=lambda identity, issuer: f"{identity} {issuer}")
    monkeypatch.setattr(online, "sigstore_verifier", SimpleNamespace(Verifier=lambda trusted_root: made, policy=policy))
    return made


@pytest.fixture
def files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("a")
    Manifest.build(tmp_path / "data").save(tmp_path / "m.json")
    return tmp_path / "m.json", tmp_path / "m.sig"


@pytest.mark.parametrize(
    ("token", "ambient", "asked"),
    [
        ("ann@example.org", None, ["ann@example.org"]),
        (None, "ann@example.org", ["ambient", "ann@example.org"]),
        (None, None, ["ambient", "browser", "ann@example.org"]),
    ],
    ids=["token", "CI", "browser"],
)
def test_who_signs(service, files, token, ambient, asked):
    service.ambient = ambient
    sign(*files, identity_token=token)
    assert service.asked == asked
    verify_signature(*files, **SIGNER)


def test_another_manifest_another_signer_and_a_forged_bundle_are_refused(service, files):
    sign(*files, identity_token="ann@example.org")
    for other in ({"identity": "eve@example.org"}, {"oidc_issuer": "https://issuer.evil"}):
        with pytest.raises(ProvenanceError, match="must be what was signed but is not: ValueError: signed by ann"):
            verify_signature(*files, **{**SIGNER, **other})
    files[1].write_text(files[1].read_text().replace("ann@", "eve@"))
    with pytest.raises(ProvenanceError, match="the seal is broken"):
        verify_signature(*files, **{**SIGNER, "identity": "eve@example.org"})
    sign(*files, identity_token="ann@example.org")
    files[0].write_text(files[0].read_text().replace('"a"', '"b"'))
    with pytest.raises(ProvenanceError, match="must be what was signed"):
        verify_signature(*files, **SIGNER)
    files[1].write_text("junk")
    with pytest.raises(ProvenanceError, match="must be what was signed"):
        verify_signature(*files, **SIGNER)


def test_a_signature_by_anybody_is_none(service, files):
    sign(*files, identity_token="ann@example.org")
    with pytest.raises(ValueError, match="identity and oidc_issuer"):
        verify_signature(*files, identity="ann@example.org")
