"""Against a server on this machine, with a certificate authority that lives as long as the test."""

import datetime
import hashlib
import http.server
import ipaddress
import ssl
import threading

import pytest
from mlx_bulwark.provenance import ProvenanceError, fetch

pytest.importorskip("cryptography")
CONTENT = b"x,y\n1,2\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def certificates(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)

    def issue(name, key, issuer, issuer_key, authority):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if authority:
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def named(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = issue(named("test authority"), ca_key, named("test authority"), ca_key, True)
    server = issue(named("localhost"), key, named("test authority"), ca_key, False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(
        server.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        port = self.server.server_address[1]
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(CONTENT)
            except OSError:
                return
        elif self.path.startswith("/to-"):
            targets = {
                "/to-http": f"http://127.0.0.1:{port}/data",
                "/to-data": "/data",
                "/to-file": "file:///etc/hosts",
            }
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
        elif self.path == "/data":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            self.send_error(404)

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.server_address[1]}", ssl.create_default_context(cafile=folder / "ca.pem")
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", ["/data", "/to-data"])
def test_what_was_asked_for_arrives(server, tmp_path, path):
    url, context = server
    fetch(url + path, SHA256, tmp_path / "data", ssl_context=context, max_bytes=len(CONTENT))
    assert (tmp_path / "data").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("path", "sha256", "max_bytes", "reason"),
    [
        ("/data", "0" * 64, 1 << 20, "must have the digest"),
        ("/data", SHA256, len(CONTENT) - 1, "at most 7999 bytes"),
        ("/endless", SHA256, 1 << 20, "at most 1048576 bytes"),
        ("/to-http", SHA256, 1 << 20, "must stay on https"),
        ("/to-file", SHA256, 1 << 20, "not allowed"),
        ("/none", SHA256, 1 << 20, "must be reachable"),
    ],
)
def test_anything_else_leaves_nothing_behind(server, tmp_path, path, sha256, max_bytes, reason):
    url, context = server
    (tmp_path / "data").write_text("before")
    with pytest.raises(ProvenanceError, match=reason):
        fetch(url + path, sha256, tmp_path / "data", ssl_context=context, max_bytes=max_bytes)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data").read_text() == "before"


def test_an_unknown_authority_is_refused(server, tmp_path):
    with pytest.raises(ProvenanceError, match="certificate"):
        fetch(server[0] + "/data", SHA256, tmp_path / "data")


def test_contexts_that_verify_nothing_are_refused(tmp_path):
    context = ssl.create_default_context()
    context.check_hostname = False
    with pytest.raises(ValueError, match="verify certificates"):
        fetch("https://localhost/", SHA256, tmp_path / "data", ssl_context=context)
    with pytest.raises(ValueError, match="https://"):
        fetch("http://localhost/", SHA256, tmp_path / "data")
