"""Access: several API keys, stored hashed and reloaded while the server runs; CORS; TLS."""

from __future__ import annotations

import hashlib
import hmac
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mcp.server.mcpserver import MCPServer
from pydantic import ValidationError
from typer.testing import CliRunner

from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.faces.cli.commands import app
from embeddings_mcp.faces.http.api_keys import Keyring, new_key
from embeddings_mcp.faces.http.app import create_app, serve_http
from embeddings_mcp.settings import Settings
from tests.support import client_of, no_file_descriptors_left, server_process, service_of

SETTINGS = {"api_key": "plain", "api_keys": "alice=first bob=second alice=third"}


def settings(**chosen: Any) -> Settings:
    return Settings(**chosen)


def status(client: httpx.Client, key: str, path: str = "/v1/models") -> int:
    return client.get(path, headers={"authorization": f"Bearer {key}"}).status_code


# --- Known keys ------------------------------------------------------------------------------------------------------


def test_every_key_has_its_owner() -> None:
    keyring = Keyring(settings(**SETTINGS))
    assert [keyring.owner(key) for key in (b"plain", b"first", b"second", b"third")] == [
        "api-key",
        "alice",
        "bob",
        "alice",
    ]
    assert [keyring.owner(key) for key in (b"", b"firs", b"first ", b"alice", b"alice=first")] == [None] * 5


def test_a_key_may_be_in_any_encoding() -> None:
    keyring = Keyring(settings(api_key="schl\udcfcssel"))  # as Python decodes an environment variable in latin-1
    assert keyring.owner(b"schl\xfcssel") == "api-key"
    assert keyring.owner("schlüssel".encode()) is None


def test_without_a_key_in_the_settings_none_is_required() -> None:
    assert not Keyring(settings()).in_use
    assert not Keyring(settings(api_key="")).in_use


def test_an_empty_file_of_keys_admits_nobody(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    keyring = Keyring(settings(api_keys_file=file))
    assert keyring.in_use
    assert keyring.owner(b"") is None
    with client_of(api_keys_file=file) as client:
        assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("wrong", ["nothing", "=sk-secret", "a b=", "semi;colon=sk-secret"])
def test_a_key_without_a_name_is_refused_and_not_quoted(wrong: str) -> None:
    with pytest.raises(InvalidSetting, match="NAME=KEY") as refused:
        Keyring(settings(api_keys=wrong))
    assert "secret" not in refused.value.message


def test_a_new_key_is_recognized_by_its_line_which_does_not_contain_it(tmp_path: Path) -> None:
    key, line = new_key("carol")
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n{line}  # until March\n")
    assert key not in line
    assert Keyring(settings(api_keys_file=file)).owner(key.encode()) == "carol"
    assert new_key("carol")[0] != key


def test_a_file_of_keys_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    key, line = new_key("carol")
    file = tmp_path / "keys"
    file.write_text(f"{line}\n", encoding="utf-8-sig")
    assert Keyring(settings(api_keys_file=file)).owner(key.encode()) == "carol"


def test_the_command_prints_the_line_to_stdout_and_the_key_to_stderr() -> None:
    result = CliRunner().invoke(app, ["key", "dave"])
    key = result.stderr.split()[-1]
    assert result.stdout == f"dave sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "new\nline", "#"])
def test_an_invalid_name_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match="letters, digits"):
        new_key(name)


def test_a_malformed_line_in_the_file_of_keys_is_refused_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{new_key('a')[1]}\nb plain-text-key\n")
    with pytest.raises(InvalidSetting, match=r"line 2 of .*NAME sha256:HEX") as refused:
        Keyring(settings(api_keys_file=file))
    assert "plain-text-key" not in refused.value.message
    with pytest.raises(InvalidSetting, match="cannot be read"):
        Keyring(settings(api_keys_file=tmp_path / "none"))


# --- Rotation --------------------------------------------------------------------------------------------------------


def test_keys_come_and_go_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (old, old_line), (new, new_line) = new_key("old"), new_key("new")
    file = tmp_path / "keys"
    file.write_text(old_line)
    with client_of(api_keys_file=file) as client:
        assert (status(client, old), status(client, new)) == (200, 401)
        file.write_text(f"{old_line}\n{new_line}\n")
        assert (status(client, old), status(client, new)) == (200, 200)
        file.write_text(f"{new_line}\n")
        assert (status(client, old), status(client, new)) == (401, 200)
    assert old not in caplog.text
    assert new not in caplog.text


@pytest.mark.parametrize("state", ["damaged", "missing"])
def test_a_file_that_cannot_be_read_any_more_leaves_the_keys_as_they_were(
    tmp_path: Path, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, line = new_key("a")
    file = tmp_path / "keys"
    file.write_text(line)
    keyring = Keyring(settings(api_keys_file=file))
    if state == "missing":
        file.unlink()
    else:
        file.write_text("not a line of keys")
    assert [keyring.owner(key.encode()) for _ in range(3)] == ["a"] * 3
    assert caplog.text.count("the previous ones stay valid") == 1
    other, other_line = new_key("b")
    file.write_text(f"{other_line}  # again\n")
    assert keyring.owner(other.encode()) == "b"
    assert keyring.owner(key.encode()) is None


def test_a_key_revoked_while_the_file_could_not_be_read_is_refused_once_it_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (old, old_line), (new, new_line) = new_key("old"), new_key("new")
    file = tmp_path / "keys"
    file.write_text(f"{old_line}\n{new_line}\n")
    with client_of(api_keys_file=file) as client:
        assert (status(client, old), status(client, new)) == (200, 200)
        file.write_text(f"{new_line}\n")
        with no_file_descriptors_left():
            assert [status(client, key) for key in (old, new, old)] == [200] * 3
        assert (status(client, old), status(client, new)) == (401, 200)
    assert caplog.text.count("the previous ones stay valid") == 1
    assert caplog.text.count("were reloaded") == 1


def test_keys_are_compared_by_digest_every_one_and_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return hmac.compare_digest(given, known)

    keyring = Keyring(settings(**SETTINGS))
    monkeypatch.setattr("embeddings_mcp.faces.http.api_keys.hmac", SimpleNamespace(compare_digest=compare))
    for key in (b"plain", b"third", b"none of them", b"f"):
        compared.clear()
        keyring.owner(key)
        assert len(compared) == 4, "no early exit at a match"
        assert {len(side) for pair in compared for side in pair} == {32}, "digests only, whatever the key's length"


# --- Routes and origins ----------------------------------------------------------------------------------------------


def test_health_routes_may_be_set_to_require_a_key() -> None:
    with client_of(api_key="key", without_key=()) as client:
        assert client.get("/v1/health/live").status_code == 401
        assert status(client, "key", "/v1/health/live") == 200


def test_a_server_that_others_can_reach_may_be_keyless_if_that_is_set() -> None:
    create_app(service_of(), MCPServer("test"), settings(host="0.0.0.0", allow_keyless=True))


def test_settings_of_access_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_WITHOUT_KEY", "health metrics")
    monkeypatch.setenv("EMBEDDINGS_MCP_CORS_ORIGINS", "https://App.example http://localhost:3000")
    monkeypatch.setenv("EMBEDDINGS_MCP_API_KEYS", "a=secret-of-a")
    chosen = Settings()
    assert chosen.without_key == ("health", "metrics")
    monkeypatch.setenv("EMBEDDINGS_MCP_WITHOUT_KEY", "none")
    assert Settings().without_key == ()
    assert chosen.cors_origins == ("https://app.example", "http://localhost:3000")
    assert "secret-of-a" not in repr(chosen)


@pytest.mark.parametrize(
    "origin", ["*", "https://*.example", "app.example", "https://app.example/path", "null", "m\udcfcller.example"]
)
def test_an_origin_is_one_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="must be origins"):
        settings(cors_origins=origin)


def test_no_page_of_another_origin_is_answered_unless_it_is_set() -> None:
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with client_of() as client:
        answer = client.options("/v1/embeddings", headers=preflight)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-origin" not in client.get("/v1/models").headers


def test_a_page_of_an_origin_that_is_set_is_allowed_and_no_other() -> None:
    with client_of(api_key="key", cors_origins="https://app.example") as client:
        preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
        granted = client.options("/mcp", headers=preflight | {"access-control-request-headers": "authorization"})
        allowed = client.get("/v1/models", headers={"origin": "https://app.example", "authorization": "Bearer key"})
        keyless = client.get("/v1/models", headers={"origin": "https://app.example"})
        other = client.get("/v1/models", headers={"origin": "https://evil.example", "authorization": "Bearer key"})
        denied = client.options("/mcp", headers=preflight | {"origin": "https://evil.example"})
    assert (granted.status_code, allowed.status_code, keyless.status_code, other.status_code) == (200, 200, 401, 403)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in other.headers
    assert denied.status_code == 400
    assert "access-control-allow-origin" not in denied.headers


# --- TLS -------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from embeddings_mcp.faces.http.app import serve_http
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.settings import Settings
from tests.support import service_of

service = service_of()
serve_http(service, build_mcp_server(service), Settings(port=0, tls_certificate=sys.argv[1], tls_key=sys.argv[2]))
"""


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def test_with_a_certificate_the_server_speaks_https(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    context = ssl.create_default_context(cafile=chain)
    with server_process(sys.executable, "-c", SCRIPT, str(chain), str(key)) as (_process, url):
        assert url.startswith("https://127.0.0.1:")
        port = httpx.URL(url).port
        answer = httpx.get(f"https://localhost:{port}/v1/models", verify=context)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/v1/models")
    assert answer.status_code == 200


def test_the_error_for_an_unusable_certificate_says_what_to_do(tmp_path: Path) -> None:
    chain, _key = certificate(tmp_path)
    for wrong in (tmp_path / "none.pem", chain):
        with pytest.raises(InvalidSetting, match="EMBEDDINGS_MCP_TLS_KEY"):
            serve_http(service_of(), MCPServer("test"), settings(port=0, tls_certificate=chain, tls_key=wrong))
    with pytest.raises(ValidationError, match="no effect without EMBEDDINGS_MCP_TLS_CERTIFICATE"):
        settings(tls_key=chain)
