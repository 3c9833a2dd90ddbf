"""The encoder as a whole: each text its own vector, whoever its neighbours are and however they go through it."""

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
WAYS = {"bert": "packed", "electra": "packed", "mpnet": "padded", "fnet": "apart"}
"""Model types that go through in every way that there is."""

TEXTS = st.lists(st.sampled_from(["Water.", "Der Kaffee ist kalt.", "猫"]) | st.text(max_size=40), max_size=12)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """A tiny model of each type, with E5's tokenizer."""
    made = {}
    for model_type in WAYS:
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(model_type, **CONFIG)
        )
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(family("e5").folder / name, folder)
        made[model_type] = load_encoder(f"test/{model_type}", folder)
    return made


@pytest.mark.parametrize("model_type", WAYS)
@pytest.mark.parametrize("budget", [1, 100, 10_000])
@settings(max_examples=20, deadline=None)
@given(texts=TEXTS)
def test_each_text_gets_the_vector_that_it_has_alone_in_its_place(
    encoders: dict[str, Encoder], model_type: str, budget: int, texts: list[str]
) -> None:
    encoder = encoders[model_type]
    alone = [encode(encoder, [text]) for text in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "facts", replace(encoder.facts, tokens_per_batch=budget))
        together = encode(encoder, texts)

    assert together.vectors.shape == (len(texts), WIDTH)
    assert together.prompt_tokens == sum(embedded.prompt_tokens for embedded in alone)
    for vector, embedded in zip(together.vectors, alone, strict=True):
        np.testing.assert_allclose(vector, embedded.vectors[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model_type", "way"), WAYS.items())
def test_a_model_goes_the_cheapest_way_that_keeps_its_vectors(
    encoders: dict[str, Encoder], model_type: str, way: str
) -> None:
    assert encoders[model_type].facts.packed == (way == "packed")


def test_a_text_that_is_too_long_is_named_by_its_place_among_hundreds(encoders: dict[str, Encoder]) -> None:
    texts = [*["Water."] * 580, "water " * 100, "Water."]
    with pytest.raises(InputTooLong) as refused:
        encode(encoders["bert"], texts)
    assert refused.value.index == 580
    assert len(encode(encoders["bert"], texts, truncate="END").vectors) == len(texts)


def test_a_limit_may_be_lowered_but_not_raised() -> None:
    folder = family("e5").folder

    assert load_encoder("test/e5", folder, max_tokens=16).facts.card.max_tokens == 16
    assert load_encoder("test/e5", folder, max_tokens=10**6).facts.card.max_tokens == 64


def test_a_licence_that_forbids_commercial_use_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    known = ModelCard(id="nvidia/nv-embed-v2", licence="CC-BY-NC-4.0", non_commercial=True)

    with caplog.at_level(logging.WARNING):
        load_encoder(known.id, family("nv-embed-v2").folder, known=known)

    assert "nvidia/nv-embed-v2 may not be used commercially: its licence is CC-BY-NC-4.0" in caplog.text


@pytest.mark.parametrize("device", ["cuda:7", "quantum", "xla"])
def test_a_device_that_is_not_there_is_said(device: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"the device '{device}' cannot be used here"):
        load_encoder("test/e5", family("e5").folder, device=device)


@pytest.mark.parametrize("name", ["e5", "nemotron-3-embed", "nv-embed-v2", "bge-m3"])
def test_half_precision_costs_some_digits_and_nothing_else(name: FamilyName) -> None:
    folder, texts = family(name).folder, ["Water.", "Der Kaffee ist kalt."]

    exact = encode(load_encoder("test/exact", folder, precision="float32"), texts).vectors
    half = encode(load_encoder("test/half", folder, precision="bfloat16"), texts).vectors

    assert half.dtype == np.float32
    cosines = (exact * half).sum(1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(half, axis=1))
    assert cosines.min() > 0.999
