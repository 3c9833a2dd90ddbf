"""Building a service from settings: which models it has, which is the default, and what is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings_mcp.assemble import build_service, settings_for_model
from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.errors import CheckpointInvalid, EmbeddingsError, InvalidSetting
from embeddings_mcp.models import DEFAULT_MODEL, CardOverride
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    folder = find_bundled(DEFAULT_MODEL)
    assert folder is not None
    return folder


def ids_and_default(service: EmbeddingService) -> list[tuple[str, bool]]:
    return [(entry["id"], entry["default"]) for entry in service.known_models()]


def test_the_bundled_model_is_described_before_it_is_loaded() -> None:
    (entry,) = build_service(Settings()).known_models()
    assert (entry["id"], entry["aliases"], entry["default"]) == (DEFAULT_MODEL, ["all-MiniLM-L6-v2"], True)
    assert (entry["dimensions"], entry["max_tokens"], entry["allowed_dimensions"]) == (384, 256, [])
    assert (entry["input_type"], entry["served_from"], entry["license"]) == ("ignored", "local", "Apache-2.0")


def test_a_folder_is_described_by_its_files_under_the_given_name(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "a folder=with signs"
    link.symlink_to(checkpoint, target_is_directory=True)
    (entry,) = build_service(Settings(models=(f"mine={link}",))).known_models()
    assert (entry["id"], entry["dimensions"], entry["max_tokens"]) == ("mine", 384, 256)


def test_a_folder_in_the_home_directory_is_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(checkpoint, target_is_directory=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids_and_default(build_service(Settings(models=("mine=~/model",)))) == [("mine", True)]


def test_a_known_model_has_its_own_id_under_any_of_its_names(checkpoint: Path) -> None:
    for spec in ("all-minilm-l6-v2", f"ALL-MiniLM-L6-v2={checkpoint}"):
        assert ids_and_default(build_service(Settings(models=(spec,)))) == [(DEFAULT_MODEL, True)]


def test_a_model_of_the_hub_is_listed_before_anything_is_known_about_it() -> None:
    (entry,) = build_service(Settings(models=("somebody/something",))).known_models()
    assert entry["id"] == "somebody/something"
    assert not entry.keys() & {"dimensions", "max_tokens"}


def test_a_card_in_the_settings_takes_precedence_over_built_in_ones() -> None:
    card = CardOverride(id="somebody/something", aliases=("something",), dimensions=64, matryoshka=(32,))
    (entry,) = build_service(Settings(models=("SOMETHING",), cards=(card,))).known_models()
    assert (entry["id"], entry["dimensions"], entry["allowed_dimensions"]) == ("somebody/something", 64, [32])


def test_the_first_model_is_the_default_unless_another_is_named(checkpoint: Path) -> None:
    models = (f"mine={checkpoint}", DEFAULT_MODEL)
    assert ids_and_default(build_service(Settings(models=models))) == [("mine", True), (DEFAULT_MODEL, False)]
    for name in (DEFAULT_MODEL, "all-minilm-l6-v2"):
        service = build_service(Settings(models=models, default_model=name))
        assert ids_and_default(service) == [("mine", False), (DEFAULT_MODEL, True)]


@pytest.mark.parametrize(
    ("models", "default", "error", "message"),
    [
        (("mine=/no/such/folder",), None, CheckpointInvalid, "/no/such/folder is not a folder"),
        (("mine=",), None, InvalidSetting, "'mine=' must be given as ID or as ID=PATH"),
        (("=/some/where",), None, InvalidSetting, "'=/some/where' must be given as ID or as ID=PATH"),
        (("m\udcfcller",), None, InvalidSetting, r"'m\udcfcller' must have a name in UTF-8"),
        (("./model",), None, InvalidSetting, "is a path: give it a name, as in my-model=./model"),
        (("~/model",), None, InvalidSetting, "is a path"),
        (("C:\\model",), None, InvalidSetting, "is a path"),
        ((DEFAULT_MODEL, "all-MiniLM-L6-v2"), None, InvalidSetting, "two models have the name"),
        (("a/b", "A/B"), None, InvalidSetting, "two models have the name 'a/b'"),
        (("a/b",), "c", InvalidSetting, "the default model 'c' is not among the models served: a/b"),
        (("default",), None, InvalidSetting, "no model can be named 'default'"),
    ],
)
def test_invalid_models_are_rejected(
    models: tuple[str, ...], default: str | None, error: type[EmbeddingsError], message: str
) -> None:
    with pytest.raises(error) as caught:
        build_service(Settings(models=models, default_model=default))
    assert message in caught.value.message


def test_the_settings_for_one_model_keep_its_path() -> None:
    settings = Settings(models=("a/b=/some/where", DEFAULT_MODEL), default_model="a/b", device="cpu")
    for model, spec in {
        "A/b": "a/b=/some/where",
        "all-minilm-l6-v2": DEFAULT_MODEL,
        "a/b=/else/where": "a/b=/else/where",
        "c/d": "c/d",
    }.items():
        one = settings_for_model(settings, model)
        assert (one.models, one.default_model, one.device) == ((spec,), None, "cpu")
