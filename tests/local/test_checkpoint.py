"""Checkpoints give the same vectors as in sentence-transformers, and describe themselves in a card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from benchmarks.bulk import encode
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Pooling
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from embeddings_mcp.embedders.local.checkpoint import read_checkpoint
from embeddings_mcp.embedders.local.encoder import load_encoder
from embeddings_mcp.errors import CheckpointInvalid, InvalidRequest
from embeddings_mcp.models import InputType, ModelCard
from tests.local.checkpoints import (
    TEXTS,
    WIDTH,
    WORDS,
    Modules,
    assert_as_sentence_transformers_reads_it,
    assert_same,
    edit,
    edit_tensors,
    ours,
    save,
    save_plain,
    theirs,
)
from tests.local.golden import FamilyName, family

MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.mark.parametrize("base", ["e5", "bge-m3", "nemotron-3-embed"])
@pytest.mark.parametrize("prompt", ["pooled", "left out"])
@pytest.mark.parametrize("mode", [*MODES, ["mean", "cls"], MODES], ids=str)
def test_every_pooling_mode_matches_sentence_transformers(
    tmp_path: Path, base: FamilyName, mode: str | list[str], prompt: str
) -> None:
    pooling = Pooling(WIDTH, pooling_mode=mode, include_prompt=prompt == "pooled")
    model = save(tmp_path, pooling, base=base, prompts={"query": "query: ", "document": "passage: "})

    assert_same(ours(tmp_path, WORDS, "query"), theirs(model, WORDS, prompt_name="query"))


STAGES: dict[str, Modules] = {
    "Dense with Tanh": lambda: [Dense(WIDTH, 8)],
    "Dense without bias": lambda: [Dense(WIDTH, 48, bias=False)],
    "Dense with Identity": lambda: [Dense(WIDTH, 8, activation_function=torch.nn.Identity())],
    "Dense with ReLU": lambda: [Dense(WIDTH, 8, activation_function=torch.nn.ReLU())],
    "Dense with GELU": lambda: [Dense(WIDTH, 8, activation_function=torch.nn.GELU())],
    "Dense with a PReLU, which has parameters": lambda: [Dense(WIDTH, 8, activation_function=torch.nn.PReLU())],
    "Dense twice": lambda: [Dense(WIDTH, 48), Dense(48, 8, activation_function=torch.nn.Sigmoid())],
    "LayerNorm": lambda: [LayerNorm(WIDTH)],
    "Normalize": lambda: [Normalize()],
    "Dropout": lambda: [Dropout(0.5)],
    "all of them": lambda: [Dense(WIDTH, 8), LayerNorm(8), Dropout(0.5), Normalize()],
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_stages_after_the_pooling_run_in_their_order(tmp_path: Path, stages: Modules) -> None:
    model = save(tmp_path, Pooling(WIDTH), *stages())

    vectors = ours(tmp_path, TEXTS)

    assert_same(vectors, theirs(model, TEXTS))
    assert read_checkpoint(tmp_path).dimensions == vectors.shape[1]


def test_a_text_with_no_tokens_besides_an_unpooled_prompt_is_refused(tmp_path: Path) -> None:
    # This tokenizer adds no special token at the end; sentence-transformers would return zeros.
    save(tmp_path, Pooling(WIDTH, include_prompt=False), base="nemotron-3-embed", prompts={"query": "query: "})

    with pytest.raises(InvalidRequest, match="`text 256` has no tokens of its own after the prompt"):
        ours(tmp_path, [*["Water."] * 256, ""], "query")


def test_instructors_prompt_is_not_pooled_although_its_files_do_not_say_so(tmp_path: Path) -> None:
    model = save(tmp_path, Pooling(WIDTH), prompts={"query": "Represent the question: "})
    model.set_pooling_include_prompt(False)  # as sentence-transformers does for a model of this name

    vectors = encode(load_encoder("hkunlp/instructor-large", tmp_path), WORDS, input_type="query").vectors

    assert_same(vectors, theirs(model, WORDS, prompt_name="query"))


def test_nv_embeds_prompt_is_not_pooled_even_without_modules_json(tmp_path: Path) -> None:
    with_modules = Path(shutil.copytree(family("nv-embed-v2").folder, tmp_path / "with"))
    edit(with_modules / "config_sentence_transformers.json", prompts={"query": "the question: "})
    without_modules = Path(shutil.copytree(with_modules, tmp_path / "without"))
    (without_modules / "modules.json").unlink()

    assert_same(ours(without_modules, TEXTS, "query"), ours(with_modules, TEXTS, "query"))


def test_prompts_go_before_queries_and_passages(tmp_path: Path) -> None:
    model = save(tmp_path, Pooling(WIDTH), prompts={"query": "the question: ", "document": "the text: "})
    encoder = load_encoder("test/tiny", tmp_path)

    query, passage = (encode(encoder, TEXTS, input_type=kind) for kind in get_args(InputType))

    assert_same(query.vectors, np.asarray(model.encode_query(TEXTS)))
    assert_same(passage.vectors, np.asarray(model.encode_document(TEXTS)))
    assert query.prompt_tokens == model.tokenize(TEXTS, prompt="the question: ")["attention_mask"].sum()


@pytest.mark.parametrize("name", ["document", "passage", "corpus"])
def test_the_passage_prompt_may_have_any_of_its_names(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, Pooling(WIDTH), prompts={"query": "the question: ", name: "the text: "})

    assert_same(ours(tmp_path, TEXTS, "passage"), theirs(model, TEXTS, prompt_name=name))


def test_the_default_prompt_may_be_a_builtin_one_that_is_not_set(saved: Path) -> None:
    edit(saved / "config_sentence_transformers.json", prompts={}, default_prompt_name="document")

    assert_as_sentence_transformers_reads_it(saved)


def test_the_default_prompt_goes_before_texts_without_an_input_type(tmp_path: Path) -> None:
    prompts = {"query": "the question: ", "sts": "compare: "}
    model = save(tmp_path, Pooling(WIDTH), prompts=prompts, default_prompt_name="sts")

    assert_same(ours(tmp_path, TEXTS), theirs(model, TEXTS))
    assert_same(ours(tmp_path, TEXTS, "query"), theirs(model, TEXTS, prompt_name="query"))
    assert_same(ours(tmp_path, TEXTS, "passage"), theirs(model, TEXTS, prompt=""))


@pytest.mark.parametrize(
    ("prompts", "default"),
    [({"query": "say: ", "document": "say: "}, None), ({"sts": "compare: "}, "sts"), ({"sts": "compare: "}, None)],
    ids=["one for both types", "one for neither type", "one that is not the default"],
)
def test_a_prompt_goes_only_before_the_texts_that_it_is_for(
    tmp_path: Path, prompts: dict[str, str], default: str | None
) -> None:
    model = save(tmp_path, Pooling(WIDTH), prompts=prompts, default_prompt_name=default)

    assert_same(ours(tmp_path, TEXTS), theirs(model, TEXTS))
    assert_same(ours(tmp_path, TEXTS, "query"), np.asarray(model.encode_query(TEXTS)))
    assert_same(ours(tmp_path, TEXTS, "passage"), np.asarray(model.encode_document(TEXTS)))


@pytest.mark.parametrize("length", [10, WIDTH, 2 * WIDTH])
def test_vectors_are_truncated_as_the_checkpoint_says(tmp_path: Path, length: int) -> None:
    save(tmp_path, Pooling(WIDTH), Normalize(), truncate_dim=length)
    model = SentenceTransformer(str(tmp_path), device="cpu")

    vectors = ours(tmp_path, TEXTS)

    assert_same(vectors, theirs(model, TEXTS))
    assert read_checkpoint(tmp_path).dimensions == vectors.shape[1] == min(length, WIDTH)


# --- older layouts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plain checkpoint: transformer and mean pooling."""
    save(tmp_path / "model", Pooling(WIDTH))
    return tmp_path / "model"


def test_a_transformer_may_have_a_folder_of_its_own(saved: Path) -> None:
    folder = saved / "0_Transformer"
    folder.mkdir()
    for path in saved.iterdir():
        if path.is_file() and path.name not in {"modules.json", "config_sentence_transformers.json"}:
            path.rename(folder / path.name)
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (saved / "modules.json").write_text(json.dumps(modules), encoding="utf-8")

    assert_as_sentence_transformers_reads_it(saved)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        {f"pooling_mode_{name}": True for name in ("cls_token", "weightedmean_tokens", "lasttoken")},
        {"pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True},
    ],
    ids=lambda switches: " ".join(switches) or "none",
)
def test_pooling_may_be_set_by_one_switch_per_mode(saved: Path, switches: dict[str, bool]) -> None:
    config = {"word_embedding_dimension": WIDTH} | switches
    (saved / "1_Pooling" / "config.json").write_text(json.dumps(config), encoding="utf-8")

    assert_as_sentence_transformers_reads_it(saved)


def test_a_model_without_sentence_transformers_files_gets_mean_pooling(tmp_path: Path) -> None:
    shutil.copytree(family("nemotron-3-embed").folder, tmp_path / "model")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (tmp_path / "model" / name).unlink()

    assert_as_sentence_transformers_reads_it(tmp_path / "model")


ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 16}

WITH_HEADS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "BERT for question answering": ("bert", AutoModelForQuestionAnswering, ENCODER),
    "DistilBERT for masked tokens": ("distilbert", AutoModelForMaskedLM, {"dim": WIDTH, "n_layers": 2, "n_heads": 2}),
    "ModernBERT for masked tokens": (
        "modernbert",
        AutoModelForMaskedLM,
        ENCODER | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "ELECTRA for replaced tokens": ("electra", AutoModelForPreTraining, ENCODER | {"embedding_size": 16}),
    "Nomic for classification, with a pooler": ("nomic_bert", AutoModelForSequenceClassification, ENCODER),
    "Qwen for classification": ("qwen3", AutoModelForSequenceClassification, DECODER),
}


@pytest.mark.parametrize(("kind", "architecture", "config"), WITH_HEADS.values(), ids=WITH_HEADS)
def test_a_head_that_a_model_was_saved_with_is_ignored(
    tmp_path: Path, kind: str, architecture: Any, config: dict[str, Any]
) -> None:
    save_plain(tmp_path, kind, architecture, **config)

    assert_as_sentence_transformers_reads_it(tmp_path)


GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}
GPT_NEO = {
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
    "max_position_embeddings": 64,
}
LONGFORMER = ENCODER | {"attention_window": 8, "pad_token_id": 1, "max_position_embeddings": 66}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}

POSITIONS, MASK, MASKED = torch.arange(64)[None], torch.ones(1, 1, 64, 64).tril(), torch.tensor(-1e9)
WITH_BUFFERS: dict[str, tuple[str, Any, dict[str, Any], dict[str, torch.Tensor]]] = {
    "CodeGen": ("codegen", AutoModel, GPT | {"n_head": 4, "rotary_dim": 8}, {"h.0.attn.causal_mask": MASK}),
    "GPT": ("openai-gpt", AutoModel, GPT, {"h.0.attn.bias": MASK}),
    "GPT-2": ("gpt2", AutoModel, GPT, {"h.0.attn.bias": MASK, "h.0.attn.masked_bias": MASKED}),
    "GPT-J": ("gptj", AutoModel, GPT | {"rotary_dim": 8}, {"h.0.attn.bias": MASK, "h.0.attn.masked_bias": MASKED}),
    "GPT-Neo": (
        "gpt_neo",
        AutoModel,
        GPT_NEO,
        {"h.0.attn.attention.bias": MASK, "h.0.attn.attention.masked_bias": MASKED},
    ),
    "GPT-Neo with a head": (
        "gpt_neo",
        AutoModelForCausalLM,
        GPT_NEO,
        {"transformer.h.0.attn.attention.bias": MASK, "transformer.h.0.attn.attention.masked_bias": MASKED},
    ),
    "Longformer": ("longformer", AutoModel, LONGFORMER, {"embeddings.position_ids": POSITIONS}),
    "LUKE": ("luke", AutoModel, ENCODER | {"entity_vocab_size": 10}, {"embeddings.position_ids": POSITIONS}),
    "RoFormer": ("roformer", AutoModel, ENCODER, {"embeddings.position_ids": POSITIONS}),
}


@pytest.mark.parametrize(("kind", "architecture", "config", "buffers"), WITH_BUFFERS.values(), ids=WITH_BUFFERS)
def test_buffers_that_older_versions_of_transformers_saved_are_ignored(
    tmp_path: Path, kind: str, architecture: Any, config: dict[str, Any], buffers: dict[str, torch.Tensor]
) -> None:
    save_plain(tmp_path, kind, architecture, **config)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(buffers))

    assert_as_sentence_transformers_reads_it(tmp_path)


@pytest.mark.parametrize("kind", ["longt5", "mt5", "t5", "umt5"])
@pytest.mark.parametrize("architecture", [AutoModel, AutoModelForSeq2SeqLM])
def test_the_decoder_of_an_encoder_decoder_model_is_ignored(tmp_path: Path, kind: str, architecture: Any) -> None:
    save_plain(tmp_path, kind, architecture, **T5)

    assert_as_sentence_transformers_reads_it(tmp_path)


@pytest.mark.parametrize("name", ["h.0.attn.causal_mask", "decoder.weight", "h.0.attn.bias.masked"])
def test_a_buffer_that_only_other_model_types_have_is_refused(tmp_path: Path, name: str) -> None:
    save_plain(tmp_path, "gptj", AutoModel, **GPT, rotary_dim=8)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: MASK}))

    with pytest.raises(CheckpointInvalid, match=rf"tensors are not part of the architecture: {re.escape(name)}$"):
        load_encoder("test/tiny", tmp_path)


def test_an_unknown_tensor_is_refused_even_in_a_model_that_was_saved_with_a_head(tmp_path: Path) -> None:
    save_plain(tmp_path, "distilbert", AutoModelForMaskedLM, **WITH_HEADS["DistilBERT for masked tokens"][2])
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({"distilbert.extra": torch.ones(1)}))

    with pytest.raises(CheckpointInvalid, match=r"tensors are not part of the architecture: extra$"):
        load_encoder("test/tiny", tmp_path)


@pytest.mark.parametrize(("causal", "pooling"), [(True, "lasttoken"), (False, "mean")])
def test_a_plain_language_model_gets_last_token_pooling_unless_it_is_bidirectional(
    tmp_path: Path, causal: bool, pooling: str
) -> None:
    save_plain(tmp_path, "llama", AutoModelForCausalLM, **DECODER, is_causal=causal)

    assert read_checkpoint(tmp_path).pipeline.pooling == (pooling,)
    assert_as_sentence_transformers_reads_it(tmp_path)


@pytest.mark.parametrize("kind", ["codegen", "ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt"])
def test_a_limit_may_be_called_n_positions(tmp_path: Path, kind: str) -> None:
    rotary = {"rotary_dim": 8} if kind in {"codegen", "gptj"} else {}
    save_plain(tmp_path, kind, AutoModel, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=48, **rotary)

    assert read_checkpoint(tmp_path).max_tokens == 48
    assert_as_sentence_transformers_reads_it(tmp_path, [*TEXTS, "water " * 80])


def test_rotary_positions_do_not_limit_the_length_if_the_sentence_encoder_has_a_limit(tmp_path: Path) -> None:
    save(tmp_path, Pooling(WIDTH), base="nemotron-3-embed")
    edit(tmp_path / "config.json", max_position_embeddings=32)
    edit(tmp_path / "sentence_bert_config.json", max_seq_length=100)

    assert read_checkpoint(tmp_path).max_tokens == 100
    assert_as_sentence_transformers_reads_it(tmp_path, ["water " * 80, "water " * 150])


def test_rotary_positions_may_have_nomics_field_names(tmp_path: Path) -> None:
    save_plain(tmp_path / "plain", "nomic_bert", AutoModel, **ENCODER)
    saved = tmp_path / "model"
    SentenceTransformer(str(tmp_path / "plain"), device="cpu").save(str(saved), create_model_card=False)
    edit(saved / "config.json", rope_parameters=None, rotary_emb_base=1000, max_position_embeddings=32)
    edit(saved / "sentence_bert_config.json", max_seq_length=100)

    assert read_checkpoint(saved).max_tokens == 100
    assert_as_sentence_transformers_reads_it(saved, ["water " * 80, "water " * 150])


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "su", "short_factor": [1.0]}},
    ],
    ids=["dynamic", "LongRoPE", "of one layer type", "under its old name", "LongRoPE under its old names"],
)
def test_length_dependent_rotary_positions_limit_the_length(tmp_path: Path, fields: dict[str, Any]) -> None:
    save(tmp_path, Pooling(WIDTH), base="nemotron-3-embed")
    edit(tmp_path / "config.json", max_position_embeddings=32, **fields)
    edit(tmp_path / "sentence_bert_config.json", max_seq_length=100)

    assert read_checkpoint(tmp_path).max_tokens == 32


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_the_sentence_encoders_limit_overrides_the_tokenizers(saved: Path, name: str) -> None:
    (saved / "sentence_bert_config.json").unlink()
    (saved / name).write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}), encoding="utf-8")

    assert read_checkpoint(saved).max_tokens == 16
    assert_as_sentence_transformers_reads_it(saved, ["water " * length for length in (1, 13, 14, 15, 60)])


def test_the_limit_may_come_from_the_tokenizer_or_from_the_position_embeddings(saved: Path) -> None:
    edit(saved / "tokenizer_config.json", model_max_length=24)
    assert read_checkpoint(saved).max_tokens == 24

    edit(saved / "tokenizer_config.json", model_max_length=10**30)
    assert read_checkpoint(saved).max_tokens == 64
    assert_as_sentence_transformers_reads_it(saved, ["water " * 80])


def test_a_limit_of_minus_one_is_none(tmp_path: Path) -> None:
    save(tmp_path, Pooling(WIDTH), base="nemotron-3-embed")
    edit(tmp_path / "config.json", max_position_embeddings=-1)
    edit(tmp_path / "tokenizer_config.json", model_max_length=48)
    (tmp_path / "sentence_bert_config.json").unlink()

    assert read_checkpoint(tmp_path).max_tokens == 48


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"is_decoder": True},
        {"layer_norm_eps": 0.5},
        {"return_dict": False},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"attention_probs_dropout_prob": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["e5", "bge-m3", "nemotron-3-embed"])
def test_variants_of_an_architecture_match_sentence_transformers(
    tmp_path: Path, base: FamilyName, variant: dict[str, Any]
) -> None:
    save(tmp_path, Pooling(WIDTH), base=base)
    edit(tmp_path / "config.json", **variant)

    assert_as_sentence_transformers_reads_it(tmp_path)


def test_a_config_may_omit_the_number_of_token_types(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config.pop("type_vocab_size") == 2
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")

    assert_as_sentence_transformers_reads_it(saved)


def test_positions_that_start_after_the_padding_id_reduce_the_limit(tmp_path: Path) -> None:
    save(tmp_path, Pooling(WIDTH), base="bge-m3")
    edit(tmp_path / "tokenizer_config.json", model_max_length=10**30)

    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"] == 66
    assert read_checkpoint(tmp_path).max_tokens == 64
    assert np.isfinite(ours(tmp_path, ["water " * 100])).all()


def test_positions_start_at_two_if_the_config_omits_the_padding_id(tmp_path: Path) -> None:
    save(tmp_path, Pooling(WIDTH), base="bge-m3")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config.pop("pad_token_id") == 1
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")

    assert_as_sentence_transformers_reads_it(tmp_path)


def test_texts_are_lowercased_if_the_checkpoint_says_so(tmp_path: Path) -> None:
    # This tokenizer is case-sensitive, and its special tokens must not be lowercased.
    prompts = {"query": "The QUESTION: "}
    save(tmp_path, Pooling(WIDTH, include_prompt=False), base="bge-m3", prompts=prompts)
    config = {"max_seq_length": 64, "do_lower_case": True}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = SentenceTransformer(str(tmp_path), device="cpu")
    texts = ["WATER and Coffee", "ΣΊΣΥΦΟΣ İstanbul", "Water </s> COFFEE", "ＷＡＴＥＲ with ﬁsh"]  # noqa: RUF001

    assert_same(ours(tmp_path, texts, "query"), theirs(model, texts, prompt_name="query"))
    assert_same(
        ours(tmp_path, texts, "query"), ours(tmp_path, [text.lower() for text in texts[:1]] + texts[1:], "query")
    )


CLASS = {"tokenizer_class": "BertTokenizer"}


@pytest.mark.parametrize(
    ("tokenizer_config", "config"),
    [
        (CLASS, {}),
        (CLASS | {"do_lower_case": False}, {}),
        (CLASS | {"strip_accents": False}, {}),
        (CLASS | {"tokenize_chinese_chars": False}, {}),
        ({"do_lower_case": False}, CLASS),
        ({"do_lower_case": False}, {}),
        ({}, {}),
    ],
    ids=["class", "case", "accents", "Chinese", "class in config.json", "class by model type", "nothing at all"],
)
def test_berts_normalization_is_set_by_tokenizer_config_json(
    saved: Path, tokenizer_config: dict[str, Any], config: dict[str, str]
) -> None:
    # tokenizer.json says the opposite of tokenizer_config.json and its defaults.
    tokenizer = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] |= {"lowercase": not tokenizer_config.get("do_lower_case", True)}
    edit(saved / "tokenizer.json", normalizer=tokenizer["normalizer"])
    edit(saved / "config.json", **config)
    tokenizer_config = {"model_max_length": 64} | tokenizer_config
    (saved / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    texts = [*TEXTS, "WATER and Café", "the 猫 is a cat"]

    assert_same(ours(saved, texts), theirs(SentenceTransformer(str(saved), device="cpu"), texts))


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("class_name", [None, "RobertaTokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
def test_a_space_before_texts_is_set_by_tokenizer_config_json_except_for_the_generic_class(
    tmp_path: Path, class_name: str | None, space: bool
) -> None:
    save(tmp_path, Pooling(WIDTH), base="bge-m3")
    edit(tmp_path / "config.json", model_type="roberta")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = FastTokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not space)  # the opposite of the other file
    byte_level.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    byte_level.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": class_name, "pad_token": "<pad>", "model_max_length": 64, "add_prefix_space": space}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    assert_as_sentence_transformers_reads_it(tmp_path, WORDS)


def test_an_eos_token_that_only_the_config_asks_for_is_the_one_that_is_pooled(tmp_path: Path) -> None:
    # e5-mistral was trained this way with transformers 4; sentence-transformers on version 5 ignores the field.
    model = save(tmp_path, Pooling(WIDTH, pooling_mode="lasttoken"), base="nemotron-3-embed")
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_eos_token=True)

    assert_same(ours(tmp_path, TEXTS), theirs(model, [f"{text}</s>" for text in TEXTS]))


@pytest.mark.parametrize("base", ["e5", "bge-m3", "nemotron-3-embed"])
def test_a_text_may_contain_special_tokens(tmp_path: Path, base: FamilyName) -> None:
    save(tmp_path, Pooling(WIDTH), base=base)
    names = ["<pad>", "[PAD]", "</s>", "[SEP]", "<s>", "<mask>"]
    texts = [f"the {name} water {name} is cold" for name in names] + [f"{name}water" for name in names]

    assert_as_sentence_transformers_reads_it(tmp_path, [*texts, "<pad>", "<pad> <pad> water"])
    assert_same(ours(tmp_path, texts), np.concatenate([ours(tmp_path, [text]) for text in texts]))


@pytest.mark.parametrize("base", ["e5", "bge-m3", "nemotron-3-embed"])
def test_special_tokens_in_a_text_are_plain_text_if_the_checkpoint_says_so(tmp_path: Path, base: FamilyName) -> None:
    save(tmp_path, Pooling(WIDTH), base=base)
    edit(tmp_path / "tokenizer_config.json", split_special_tokens=True)

    assert_as_sentence_transformers_reads_it(tmp_path, ["the [SEP] water </s> is cold", "<s>water[PAD]"])


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (
            "tokenizer_config.json",
            lambda token_id: {
                "added_tokens_decoder": {
                    str(token_id): {"content": "[Q]", "special": True, "normalized": False, **FLAGS}
                }
            },
        ),
        ("tokenizer_config.json", lambda _: {"additional_special_tokens": ["[Q]"]}),
        ("added_tokens.json", lambda token_id: {"[Q]": token_id}),
    ],
    ids=["by id", "by name", "in a file of their own"],
)
def test_tokens_may_be_added_by_other_files_than_tokenizer_json(
    tmp_path: Path, file: str, fields: Callable[[int], dict[str, Any]]
) -> None:
    save_plain(tmp_path, "bert", AutoModel, more_tokens=1, **ENCODER)
    tokenizer = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if not (tmp_path / file).exists():
        (tmp_path / file).write_text("{}", encoding="utf-8")
    edit(tmp_path / file, **fields(tokenizer.get_vocab_size()))

    assert tokenizer.token_to_id("[Q]") is None
    assert_as_sentence_transformers_reads_it(tmp_path, ["[Q] water", "the [Q]water", "[Q]"])


def test_a_tokenizer_may_consist_of_a_vocabulary_only(saved: Path) -> None:
    expected = ours(saved, TEXTS)
    (saved / "tokenizer.json").unlink()
    shutil.copy(family("e5").folder / "vocab.txt", saved)

    assert_same(ours(saved, TEXTS), expected)


def in_shards(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "model.safetensors").unlink()


def as_a_pickle(folder: Path) -> None:
    torch.save(AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_half_precision(folder: Path) -> None:
    AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def in_pickled_shards(folder: Path) -> None:
    tensors = AutoModel.from_pretrained(folder).state_dict()
    parts = {f"pytorch_model-{part}.bin": list(tensors)[part::2] for part in range(2)}
    for name, keys in parts.items():
        torch.save({key: tensors[key] for key in keys}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").unlink()


REWRITES = [in_shards, as_a_pickle, in_pickled_shards, in_half_precision]


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.__name__)
@pytest.mark.parametrize("base", ["e5", "nemotron-3-embed"])
def test_weights_may_be_sharded_pickled_or_in_half_precision(
    tmp_path: Path, base: FamilyName, rewrite: Callable[[Path], None]
) -> None:
    save(tmp_path, Pooling(WIDTH), base=base)
    rewrite(tmp_path)

    model = SentenceTransformer(str(tmp_path), device="cpu", model_kwargs={"dtype": torch.float32})
    assert_same(ours(tmp_path, WORDS), theirs(model, WORDS))


def test_a_dense_layer_may_be_pickled(tmp_path: Path) -> None:
    model = save(tmp_path, Pooling(WIDTH), Dense(WIDTH, 8))
    expected = theirs(model, TEXTS)
    weights = tmp_path / "2_Dense" / "model.safetensors"
    torch.save(model[2].state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()

    assert_same(ours(tmp_path, TEXTS), expected)


# --- cards -----------------------------------------------------------------------------------------------------------


CARDS: dict[str, tuple[Modules, dict[str, Any], ModelCard]] = {
    "one prompt for all": (
        lambda: [Pooling(WIDTH)],
        {},
        ModelCard(id="test/tiny", dimensions=WIDTH, max_tokens=64, input_type="ignored"),
    ),
    "prompts for queries and passages": (
        lambda: [Pooling(WIDTH, pooling_mode=["mean", "cls"])],
        {"prompts": {"query": "q: ", "document": "d: "}},
        ModelCard(
            id="test/tiny",
            dimensions=2 * WIDTH,
            max_tokens=64,
            input_type="required",
            query_prompt="q: ",
            passage_prompt="d: ",
        ),
    ),
    "a default prompt besides that for queries": (
        lambda: [Pooling(WIDTH), Dense(WIDTH, 8)],
        {"prompts": {"query": "q: ", "sts": "s: "}, "default_prompt_name": "sts"},
        ModelCard(
            id="test/tiny",
            dimensions=8,
            max_tokens=64,
            input_type="optional",
            query_prompt="q: ",
            default_prompt="s: ",
        ),
    ),
}


@pytest.mark.parametrize(("modules", "config", "card"), CARDS.values(), ids=CARDS)
def test_a_checkpoint_without_a_builtin_card_describes_itself(
    tmp_path: Path, modules: Modules, config: dict[str, Any], card: ModelCard
) -> None:
    save(tmp_path, *modules(), **config)

    assert read_checkpoint(tmp_path).card("test/tiny") == card
    assert load_encoder("test/tiny", tmp_path).info.card == card


def test_sizes_are_taken_from_the_files_and_everything_else_from_the_card(saved: Path) -> None:
    known = ModelCard(
        id="test/known",
        aliases=("known",),
        dimensions=2048,
        matryoshka=(16, WIDTH, 1024),
        max_tokens=40,
        input_type="optional",
        query_prompt="the card's: ",
        license="MIT",
    )

    card = read_checkpoint(saved, known).card(known.id, known)

    assert (card.dimensions, card.matryoshka, card.max_tokens) == (WIDTH, (16,), 40)
    assert (card.aliases, card.input_type, card.query_prompt) == (("known",), "optional", "the card's: ")
    assert card.license == "MIT"

    larger = replace(known, max_tokens=8192)
    assert read_checkpoint(saved, larger).card(known.id, larger).max_tokens == 64
