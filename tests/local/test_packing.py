"""Packing keeps the vectors: a text has the token vectors that the model's own attention gives it on its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, PreTrainedModel, T5EncoderModel

from embeddings_mcp.embedders.local.backbone import PROVEN, Backbone
from embeddings_mcp.embedders.local.bert import Bert, is_bert
from embeddings_mcp.embedders.local.sequence_length import OFFSET_POSITIONS

VOCABULARY = 40
PADDING = 0
POSITIONS = 128
LONGEST = 60
WINDOW = 8

SECONDS = 60
"""Timeout for anything that waits here."""

ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = ENCODER | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAIRSEQ = ENCODER | {"pad_token_id": 1, "bos_token_id": 0}


def longrope(head: int) -> dict[str, Any]:
    """LongRoPE: other rotary frequencies for texts of more than 16 tokens, for heads of this size."""
    factors = {"short_factor": [1.0] * (head // 2), "long_factor": [1.0 + index for index in range(head // 2)]}
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, **factors}
    return {"rope_parameters": {**scaling, "original_max_position_embeddings": 16}}


@dataclass(frozen=True)
class Kind:
    """How to build a tiny model."""

    type: str
    config: dict[str, Any]
    build: Callable[[Any], PreTrainedModel] = AutoModel.from_config


KINDS = {
    "bert": Kind("bert", ENCODER),
    "bert, causal": Kind("bert", ENCODER | {"is_decoder": True}),
    "roberta": Kind("roberta", FAIRSEQ),
    "xlm-roberta": Kind("xlm-roberta", FAIRSEQ),
    "xlm-roberta with another padding id": Kind("xlm-roberta", FAIRSEQ | {"pad_token_id": 5}),
    "distilbert": Kind(
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        | {"max_position_embeddings": POSITIONS, "pad_token_id": PADDING},
    ),
    "modernbert, texts longer than its window": Kind(
        "modernbert",
        ENCODER
        | {"num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": WINDOW}
        | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "nomic_bert": Kind("nomic_bert", ENCODER),
    "eurobert": Kind("eurobert", DECODER | {"mask_token_id": 3}),
    "llama, causal": Kind("llama", DECODER),
    "llama, bidirectional": Kind("llama", DECODER | {"is_causal": False}),
    "mistral, causal, texts longer than its window": Kind("mistral", DECODER | {"sliding_window": WINDOW}),
    "mistral, bidirectional": Kind("mistral", DECODER | {"is_causal": False, "sliding_window": None}),
    "ministral3, causal": Kind("ministral3", DECODER | {"sliding_window": None}),
    "ministral3, bidirectional, texts longer than it was first trained on": Kind(
        "ministral3",
        DECODER
        | {"is_causal": False, "sliding_window": None}
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    "qwen3, causal": Kind("qwen3", DECODER),
    "qwen3, texts longer than its window": Kind(
        "qwen3", DECODER | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
}

PACKED_BY_PROBE = {
    "electra": Kind("electra", ENCODER | {"embedding_size": 16}),
    "albert": Kind("albert", ENCODER | {"embedding_size": 16}),
    "camembert": Kind("camembert", FAIRSEQ),
    "data2vec-text": Kind("data2vec-text", FAIRSEQ),
    "qwen2, texts longer than its window": Kind(
        "qwen2", DECODER | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "gemma3_text, bidirectional within its window": Kind(
        "gemma3_text",
        DECODER
        | {"use_bidirectional_attention": True, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}

NOT_PACKED = {
    "mpnet: its own attention": Kind("mpnet", FAIRSEQ),
    "t5's encoder: relative position biases": Kind(
        "t5",
        {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        T5EncoderModel,
    ),
    "deberta-v2: its own attention": Kind("deberta-v2", ENCODER),
    "gemma2: softcapped scores": Kind("gemma2", DECODER | {"sliding_window": WINDOW}),
    "gpt_oss: attention sinks": Kind("gpt_oss", DECODER | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "mistral, bidirectional: the width of such a window is ambiguous": Kind(
        "mistral", DECODER | {"is_causal": False, "sliding_window": WINDOW}
    ),
}

BY_LENGTH = {
    "fnet: mixes all tokens of a row, including padding": Kind("fnet", ENCODER),
    "llama, longrope": Kind("llama", DECODER | longrope(8)),
    "phi3, longrope": Kind("phi3", DECODER | {"head_dim": 6} | longrope(6)),
    "convbert: reads the padding next to a text": Kind("convbert", ENCODER | {"embedding_size": 24}),
}

Rows = list[list[int]]
ROWS: st.SearchStrategy[Rows] = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=LONGEST), min_size=1, max_size=6
)
# Runs of texts of equal length take another code path in the attention.
ROWS |= st.builds(lambda rows, length: [(row * length)[:length] for row in rows], ROWS, st.integers(1, LONGEST))


def build(kind: Kind, seed: int) -> PreTrainedModel:
    """A model with random weights, large enough to be clearly nonlinear."""
    torch.manual_seed(seed)
    model = kind.build(AutoConfig.for_model(kind.type, **kind.config))
    model.train(mode=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def alone(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """The token vectors of each text on its own, computed by the unmodified model of transformers."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows])


def first_position(kind: Kind) -> int:
    """Position id of a text's first token."""
    return int(kind.config["pad_token_id"]) + 1 if kind.type in OFFSET_POSITIONS else 0


def together(kind: Kind, model: PreTrainedModel, rows: Rows) -> tuple[torch.Tensor, Backbone]:
    with torch.inference_mode():
        backbone = Backbone(model, first_position=first_position(kind))
        hidden, packing = backbone.hidden_states(rows)
    assert packing.lengths == tuple(map(len, rows))
    return hidden, backbone


def test_every_type_that_is_packed_unseen_is_shown_here() -> None:
    assert {kind.type for kind in KINDS.values()} == PROVEN


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@settings(max_examples=20)
@given(rows=ROWS, seed=st.integers(0, 2**32))
def test_packed_texts_have_the_same_vectors_as_alone(kind: Kind, rows: Rows, seed: int) -> None:
    model = build(kind, seed)
    expected = alone(model, rows)

    hidden, backbone = together(kind, model, rows)

    assert backbone.packed
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


OUR_LAYERS = {name: kind for name, kind in KINDS.items() if is_bert({"model_type": kind.type} | kind.config)}


@pytest.mark.parametrize("kind", OUR_LAYERS.values(), ids=OUR_LAYERS)
@settings(max_examples=20)
@given(rows=ROWS, seed=st.integers(0, 2**32))
def test_our_own_layers_give_the_vectors_of_transformers(kind: Kind, rows: Rows, seed: int) -> None:
    model = build(kind, seed)
    bert = Bert(model.config.to_dict(), model.state_dict(), first_position=first_position(kind), quantized=False)

    with torch.inference_mode():
        hidden, packing = bert.hidden_states(rows)

    assert packing.lengths == tuple(map(len, rows))
    torch.testing.assert_close(hidden, alone(model, rows), rtol=0, atol=1e-5)


def test_the_bert_family_runs_on_our_own_layers_but_its_variants_do_not() -> None:
    assert {kind.type for kind in OUR_LAYERS.values()} == {"bert", "roberta", "xlm-roberta"}
    assert "bert, causal" not in OUR_LAYERS


LONG_AND_SHORT: Rows = [[7 + (index * step) % 31 for index in range(length)] for step, length in ((3, LONGEST), (5, 9))]
LONG_AND_SHORT += [LONG_AND_SHORT[1][::-1], [9], LONG_AND_SHORT[0][:40]]


@pytest.mark.parametrize("kind", PACKED_BY_PROBE.values(), ids=PACKED_BY_PROBE)
def test_an_unproven_type_is_packed_if_its_vectors_stay_the_same(kind: Kind) -> None:
    model = build(kind, seed=0)
    expected = alone(model, LONG_AND_SHORT)

    hidden, backbone = together(kind, model, LONG_AND_SHORT)

    assert kind.type not in PROVEN
    assert backbone.packed
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", (NOT_PACKED | BY_LENGTH).values(), ids=NOT_PACKED | BY_LENGTH)
def test_a_type_whose_vectors_would_change_is_not_packed(kind: Kind) -> None:
    model = build(kind, seed=0)
    expected = alone(model, LONG_AND_SHORT)

    hidden, backbone = together(kind, model, LONG_AND_SHORT)

    assert not backbone.packed
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_concurrent_threads_do_not_change_each_other_s_rotary_frequencies() -> None:
    model = build(BY_LENGTH["llama, longrope"], seed=0)
    backbone = Backbone(model)
    rows = {length: [[7 + index % 31 for index in range(length)]] * 20 for length in (9, LONGEST)}
    expected = {length: alone(model, batch) for length, batch in rows.items()}
    start = threading.Barrier(2)

    def deviation(length: int) -> float:
        start.wait(timeout=SECONDS)
        with torch.inference_mode():
            results = [backbone.hidden_states(rows[length])[0] for _ in range(200)]
        return max(float((hidden - expected[length]).abs().max()) for hidden in results)

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(deviation, rows, timeout=SECONDS)) < 1e-5
