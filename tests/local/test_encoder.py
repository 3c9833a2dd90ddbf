"""The encoder as a whole: each text gets its own vector, whatever the batch and however it is batched."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.bulk import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, PreTrainedModel

from embeddings_mcp.embedders.local.encoder import Encoder, load_encoder
from embeddings_mcp.errors import InputTooLong, ModelUnavailable
from embeddings_mcp.models import ModelCard
from tests.local.checkpoints import WIDTH
from tests.local.golden import FamilyName, family

CONFIG: dict[str, Any] = {
    "vocab_size": 420,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
BATCHING = {"bert": "packed", "electra": "packed", "mpnet": "padded", "fnet": "by length"}
"""Model types that cover every kind of batching."""

TEXTS = st.lists(st.sampled_from(["Water.", "Der Kaffee ist kalt.", "猫"]) | st.text(max_size=40), max_size=12)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """A tiny model of each type, with E5's tokenizer."""
    loaded = {}
    for model_type in BATCHING:
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(model_type, **CONFIG)
        )
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(family("e5").folder / name, folder)
        loaded[model_type] = load_encoder(f"test/{model_type}", folder)
    return loaded


@pytest.mark.parametrize("model_type", BATCHING)
@pytest.mark.parametrize("budget", [1, 100, 10_000])
@settings(max_examples=20)
@given(texts=TEXTS)
def test_each_text_gets_the_same_vector_as_alone_at_its_index(
    encoders: dict[str, Encoder], model_type: str, budget: int, texts: list[str]
) -> None:
    encoder = encoders[model_type]
    alone = [encode(encoder, [text]) for text in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "info", replace(encoder.info, tokens_per_batch=budget))
        together = encode(encoder, texts)

    assert together.vectors.shape == (len(texts), WIDTH)
    assert together.prompt_tokens == sum(embedded.prompt_tokens for embedded in alone)
    for vector, embedded in zip(together.vectors, alone, strict=True):
        np.testing.assert_allclose(vector, embedded.vectors[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model_type", "batching"), BATCHING.items())
def test_a_model_is_packed_if_that_keeps_its_vectors(
    encoders: dict[str, Encoder], model_type: str, batching: str
) -> None:
    assert encoders[model_type].info.packed == (batching == "packed")


def test_a_text_that_is_too_long_is_named_by_its_index_among_hundreds(encoders: dict[str, Encoder]) -> None:
    texts = [*["Water."] * 580, "water " * 100, "Water."]
    with pytest.raises(InputTooLong) as refused:
        encode(encoders["bert"], texts)
    assert refused.value.index == 580
    assert len(encode(encoders["bert"], texts, truncate="END").vectors) == len(texts)


def test_a_limit_may_be_lowered_but_not_raised() -> None:
    folder = family("e5").folder

    assert load_encoder("test/e5", folder, max_tokens=16).info.card.max_tokens == 16
    assert load_encoder("test/e5", folder, max_tokens=10**6).info.card.max_tokens == 64


def test_a_license_that_forbids_commercial_use_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    known = ModelCard(id="nvidia/nv-embed-v2", license="CC-BY-NC-4.0", non_commercial=True)

    with caplog.at_level(logging.WARNING):
        load_encoder(known.id, family("nv-embed-v2").folder, builtin_card=known)

    assert "nvidia/nv-embed-v2 may not be used commercially: its license is CC-BY-NC-4.0" in caplog.text


@pytest.mark.parametrize("device", ["cuda:7", "quantum", "xla"])
def test_a_device_that_does_not_exist_is_refused_by_name(device: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"the device '{device}' cannot be used here"):
        load_encoder("test/e5", family("e5").folder, device=device)


@pytest.mark.parametrize("name", ["e5", "nemotron-3-embed", "nv-embed-v2", "bge-m3"])
def test_half_precision_changes_vectors_only_by_rounding(name: FamilyName) -> None:
    folder, texts = family(name).folder, ["Water.", "Der Kaffee ist kalt."]

    exact = encode(load_encoder("test/exact", folder, precision="float32"), texts).vectors
    half = encode(load_encoder("test/half", folder, precision="bfloat16"), texts).vectors

    assert half.dtype == np.float32
    cosines = (exact * half).sum(1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(half, axis=1))
    assert cosines.min() > 0.999
