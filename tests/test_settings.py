"""Settings from the environment and from flags; secrets are never printed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from embeddings_mcp.misspelt_settings import misspelt
from embeddings_mcp.models import DEFAULT_MODEL, CardOverride
from embeddings_mcp.publish.install import environment_variable
from embeddings_mcp.settings import EndpointSettings, Settings

SECRET = "sk-not-to-be-seen"


def test_the_default_is_the_bundled_model_on_loopback() -> None:
    settings = Settings()
    assert (settings.models, settings.default_model) == ((DEFAULT_MODEL,), None)
    assert (settings.host, settings.port, settings.api_key) == ("127.0.0.1", 8000, None)
    assert (settings.device, settings.precision) == ("auto", "auto")
    assert settings.max_body_bytes == 25 * 1024 * 1024


VALUES: dict[str, tuple[str, object]] = {
    "models": ("a/b  mine=/some/where\n", ("a/b", "mine=/some/where")),
    "default_model": ("mine", "mine"),
    "cards": (
        '[{"id": "mine", "dimensions": 8, "matryoshka": [4]}]',
        (CardOverride(id="mine", dimensions=8, matryoshka=(4,)),),
    ),
    "endpoints": (
        "http://localhost:1 https://b.example",
        (EndpointSettings(url="http://localhost:1"), EndpointSettings(url="https://b.example")),
    ),
    "nvidia_api_key": ("nvapi-1", SecretStr("nvapi-1")),
    "device": ("cuda:1", "cuda:1"),
    "precision": ("float16", "float16"),
    "workers": ("3", 3),
    "model_process": ("false", False),
    "cuda_graphs": ("false", False),
    "load": ("lazy", "lazy"),
    "cache": ("/some/folder", "/some/folder"),
    "cache_memory_mb": ("1", 1),
    "cache_disk_mb": ("2", 2),
    "log_format": ("json", "json"),
    "log_level": ("info", "info"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "api_key": (SECRET, SecretStr(SECRET)),
    "api_keys": (f"alice={SECRET}", SecretStr(f"alice={SECRET}")),
    "api_keys_file": ("/some/keys", Path("/some/keys")),
    "oauth_issuer": ("https://issuer.example", "https://issuer.example"),
    "oauth_resource": ("https://app.example/mcp", "https://app.example/mcp"),
    "oauth_scopes": ("read embed", ("read", "embed")),
    "allow_keyless": ("true", True),
    "without_key": ("metrics health", ("metrics", "health")),
    "tls_certificate": ("/some/chain.pem", Path("/some/chain.pem")),
    "tls_key": ("/some/key.pem", Path("/some/key.pem")),
    "cors_origins": ("https://app.example http://localhost:3000", ("https://app.example", "http://localhost:3000")),
    "allowed_hosts": ("one.example two.example:8000", ("one.example", "two.example:8000")),
    "max_body_bytes": ("3", 3),
    "max_bytes_in_flight": ("4", 4),
    "max_requests_in_flight": ("5", 5),
    "requests_per_minute": ("6", 6),
    "max_inputs": ("7", 7),
    "max_input_characters": ("8", 8),
    "max_mcp_response_bytes": ("9", 9),
    "max_queued_tokens": ("10", 10),
    "request_seconds": ("0.5", 0.5),
}
"""A value of each setting, as in its environment variable and as read; none is the default."""


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings()
    for name, (value, _) in VALUES.items():
        monkeypatch.setenv(environment_variable(name), value)
    settings = Settings()
    assert VALUES.keys() == Settings.model_fields.keys()
    for name, (_, expected) in VALUES.items():
        assert getattr(settings, name) == expected != getattr(defaults, name), name


def test_a_flag_takes_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_MODELS", "a b")
    monkeypatch.setenv("EMBEDDINGS_MCP_PORT", "9000")
    settings = Settings(models=("c",))
    assert (settings.models, settings.port) == (("c",), 9000)


def test_a_path_with_spaces_can_be_given_by_flag() -> None:
    assert Settings(models=("mine=/some where/else",)).models == ("mine=/some where/else",)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODELS", "DEFAULT_MODEL", "CARDS", "API_KEY", "PORT"):
        monkeypatch.setenv(f"EMBEDDINGS_MCP_{name}", "")
    assert Settings() == Settings.model_construct()


def test_whitespace_around_a_key_is_stripped_as_from_a_mounted_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_API_KEY", "secret\n")
    monkeypatch.setenv("NVIDIA_API_KEY", " nvapi-1\r\n")
    settings = Settings()
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "secret"
    assert settings.nvidia_api_key is not None
    assert settings.nvidia_api_key.get_secret_value() == "nvapi-1"


def test_a_single_endpoint_may_be_a_json_object_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_ENDPOINTS", ' {"url": "http://localhost:9", "dialect": "openai"} ')
    (endpoint,) = Settings().endpoints
    assert (endpoint.url, endpoint.dialect) == ("http://localhost:9", "openai")


def test_the_service_url_that_kubernetes_sets_is_not_taken_for_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_PORT", "tcp://10.96.0.17:80")
    assert Settings().port == 8000


def test_a_misspelt_variable_is_reported_but_not_settings_keys_or_those_of_kubernetes() -> None:
    settings = Settings(endpoints='[{"url": "http://localhost:9", "api_key_env": "EMBEDDINGS_MCP_MY_KEY"}]')  # type: ignore[arg-type]
    known = [f"EMBEDDINGS_MCP_{name.upper()}" for name in Settings.model_fields]
    set_by_kubernetes = ["SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
    environment = [
        *known,
        "embeddings_mcp_device",
        "EMBEDDINGS_MCP_MY_KEY",
        "PATH",
        *(f"EMBEDDINGS_MCP_{name}" for name in set_by_kubernetes),
    ]
    assert list(misspelt(environment, settings)) == []
    assert list(misspelt([*environment, "EMBEDDINGS_MCP_XYZ", "EMBEDDINGS_MCP_APIKEY"], settings)) == [
        "EMBEDDINGS_MCP_APIKEY is set but is not a setting: did you mean EMBEDDINGS_MCP_API_KEY?",
        "EMBEDDINGS_MCP_XYZ is set but is not a setting",
    ]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("MODELS", "  ", "at least 1 item"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("PORT", "http", "valid integer"),
        ("PRECISION", "int4", "'auto', 'float32', 'bfloat16', 'float16' or 'int8'"),
        ("WITHOUT_KEY", "off", "must be `health`, `metrics`, both, or `none`"),
        ("WITHOUT_KEY", "health none", "must be `health`, `metrics`, both, or `none`"),
        ("ALLOWED_HOSTS", "*", "must be names such as app.example, separated by spaces, without scheme or `*`: '*'"),
        ("ALLOWED_HOSTS", "a.example https://b.example", "without scheme or `*`: 'https://b.example'"),
        ("ALLOWED_HOSTS", "a.example,b.example", "separated by spaces, without scheme or `*`: 'a.example,b.example'"),
        ("MAX_BODY_BYTES", "0", "greater than 0"),
        ("CARDS", "{", "must be JSON"),
        ("CARDS", "[" * 100_000, "must be JSON"),
        ("CARDS", r'[{"id": "mine", "query_prompt": "half an emoji: \ud83d"}]', "must be JSON"),
        ("CARDS", '{"id": "mine"}', "must be a JSON array of objects"),
        ("CARDS", '["mine"]', "must be a JSON array of objects"),
        ("CARDS", '[{"dimensions": 8}]', "Field required"),
        (
            "CARDS",
            '[{"id": "mine", "max_token": 8}]',
            "a card has no field 'max_token'; its fields are id, aliases, dimensions",
        ),
        ("CARDS", '[{"id": "mine", "input_type": "maybe"}]', "'required', 'optional' or 'ignored'"),
        ("CARDS", '[{"id": "mine", "dimensions": 0}]', "dimensions of the card mine must be greater than 0"),
        ("CARDS", '[{"id": "mine", "max_tokens": -5}]', "max_tokens of the card mine must be greater than 0"),
        ("CARDS", '[{"id": "mine", "matryoshka": [4, -1]}]', "matryoshka of the card mine must be greater than 0"),
        ("CACHE", "~nobody-of-this-name/cache", "cannot be found: "),
    ],
)
def test_an_invalid_value_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str) -> None:
    monkeypatch.setenv(f"EMBEDDINGS_MCP_{name}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (error,) = caught.value.errors()
    assert error["loc"][0] == name.lower()
    assert problem in error["msg"]


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_the_key_is_never_printed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_API_KEY", SECRET)
    settings = Settings()
    logging.getLogger("test").warning("%s %r", settings, settings)
    printed = [str(settings), repr(settings), f"{settings.api_key}", settings.model_dump_json(), caplog.text]
    monkeypatch.setenv("EMBEDDINGS_MCP_PORT", "none")
    with pytest.raises(ValidationError) as caught:
        Settings()
    printed += [str(caught.value), repr(caught.value)]
    assert not [text for text in printed if SECRET in text]
