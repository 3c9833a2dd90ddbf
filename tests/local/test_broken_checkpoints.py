"""Damaged, incomplete and malicious checkpoints are refused before they give a vector, with the file and the reason."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.bulk import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling
from transformers import AutoModel, AutoModelForSequenceClassification

from embeddings_mcp.embedders.local.encoder import load_encoder
from embeddings_mcp.errors import CheckpointInvalid, InvalidRequest, MissingDependency
from tests.local.checkpoints import SMALL, WIDTH, edit, edit_tensors, save, save_plain, save_static
from tests.local.golden import FamilyName, family

Damage = Callable[[Path], object]

BASES: tuple[FamilyName, ...] = ("e5", "nemotron-3-embed")
"""One that runs on our own layers, and one that runs on those of transformers."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[FamilyName, Path]:
    """Intact checkpoints with one module of each class."""
    folders: dict[FamilyName, Path] = {base: tmp_path_factory.mktemp(base) for base in BASES}
    for base, folder in folders.items():
        modules = [Pooling(WIDTH), Dense(WIDTH, 16), LayerNorm(16), Normalize()]
        save(folder, *modules, base=base, prompts={"query": "query: ", "document": "passage: "})
    return folders | {"nv-embed-v2": family("nv-embed-v2").folder}


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest, sound: dict[FamilyName, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[request.param], tmp_path / "model"))


@pytest.fixture
def nv_embed(sound: dict[FamilyName, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound["nv-embed-v2"], tmp_path / "model"))


def refused(folder: Path) -> str:
    """Return the reason why the checkpoint is refused."""
    with pytest.raises(CheckpointInvalid) as error:
        load_encoder("test/broken", folder)
    assert str(folder) in error.value.message
    return error.value.message.replace(str(folder), "")


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def replace_by_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def cut(name: str, share: float = 0.5) -> Damage:
    """Truncate a file to this share, like an interrupted download."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def field(name: str, **changes: Any) -> Damage:
    return lambda folder: edit(folder / name, **changes)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: edit_tensors(folder / name, change)


def modules(*changes: tuple[int, str, object]) -> Damage:
    """Change fields of modules, given by index."""

    def damage(folder: Path) -> None:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        for index, key, value in changes:
            listed[index][key] = value
        write(folder / "modules.json", json.dumps(listed))

    return damage


def keep_modules(*indices: int) -> Damage:
    """Keep these modules, in this order."""

    def damage(folder: Path) -> None:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        write(folder / "modules.json", json.dumps([listed[index] for index in indices]))

    return damage


def layer_weight(tensors: dict[str, torch.Tensor]) -> str:
    """Return the name of a tensor of the last layer."""
    return max(name for name in tensors if "layer" in name and name.endswith("weight"))


def resize(tensors: dict[str, torch.Tensor]) -> None:
    tensors[layer_weight(tensors)] = torch.zeros(3, 5)


def fill_with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[layer_weight(tensors)].fill_(torch.nan)


def narrow_dense(folder: Path) -> None:
    edit(folder / "2_Dense" / "config.json", in_features=8)
    edit_tensors(
        folder / "2_Dense" / "model.safetensors",
        lambda found: found.update({"linear.weight": found["linear.weight"][:, :8].clone()}),
    )


MODULE = "sentence_transformers.models."

WEIGHTS: dict[str, tuple[Damage, str]] = {
    "no weights": (remove("model.safetensors"), r"model\.safetensors is missing; weights for other programs \(ONNX"),
    "a tensor is missing": (
        tensors("model.safetensors", lambda found: found.pop(layer_weight(found))),
        r"tensors are missing: \S*layer\S*weight",
    ),
    "an extra tensor": (
        tensors("model.safetensors", lambda found: found.update({"stray.weight": torch.zeros(2)})),
        r"tensors are not part of the architecture: stray\.weight",
    ),
    "a tensor is of another shape": (
        tensors("model.safetensors", resize),
        r"tensors have another shape than config\.json says: \S*layer\S*weight",
    ),
    "a weight is NaN": (tensors("model.safetensors", fill_with_nan), r"its vectors are not numbers"),
    "the weights are truncated": (cut("model.safetensors"), r"model\.safetensors: the weights cannot be read"),
    "the weights are truncated in their header": (
        cut("model.safetensors", 0.01),
        r"model\.safetensors: the weights cannot be read",
    ),
    "the weights are empty": (cut("model.safetensors", 0), r"model\.safetensors: the weights cannot be read"),
    "no weights of a layer after the pooling": (remove("2_Dense/model.safetensors"), r"2_Dense/model\.safetensors"),
    "the weights of a layer after the pooling are truncated": (
        cut("2_Dense/model.safetensors"),
        r"2_Dense/model\.safetensors",
    ),
    "a weight of a layer after the pooling is of another shape": (
        tensors("2_Dense/model.safetensors", lambda found: found.update({"linear.weight": torch.zeros(3, 5)})),
        r"2_Dense: tensors have another shape than config\.json says: linear\.weight",
    ),
    "a weight of a layer after the pooling is missing": (
        tensors("3_LayerNorm/model.safetensors", lambda found: found.pop("norm.bias")),
        r"3_LayerNorm: tensors are missing: norm\.bias",
    ),
    "a layer after the pooling takes another length than it gives": (narrow_dense, r"cannot be run: .*shape"),
}

DESCRIPTIONS: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), r"config\.json is missing"),
    "the config is truncated": (cut("config.json"), r"config\.json cannot be read"),
    "the config is not JSON": (
        lambda folder: write(folder / "config.json", "model_type: bert"),
        r"config\.json cannot",
    ),
    "the config is not text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json cannot be read",
    ),
    "the config is an array": (
        lambda folder: write(folder / "config.json", "[]"),
        r"config\.json does not hold a JSON",
    ),
    "the config is null": (lambda folder: write(folder / "config.json", "null"), r"config\.json holds nothing"),
    "the config is nested too deeply to be read": (
        lambda folder: write(folder / "config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
        r"config\.json cannot be read",
    ),
    "the config is a folder": (replace_by_folder("config.json"), r"config\.json cannot be read"),
    "no architecture": (field("config.json", model_type=None), r"config\.json: no `model_type`"),
    "an architecture that is a number": (field("config.json", model_type=5), r"`model_type` must be a string, not 5"),
    "an unknown architecture": (
        field("config.json", model_type="quantum-bert"),
        r"config\.json: the architecture 'quantum-bert' is not one .* never run",
    ),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer\.json"),
    "no tokenizer files": (remove("tokenizer.json", "tokenizer_config.json"), r"tokenizer\.json"),
    "the tokenizer is truncated": (cut("tokenizer.json"), r"tokenizer\.json: the tokenizer cannot be read"),
    "the tokenizer is an empty object": (lambda folder: write(folder / "tokenizer.json", "{}"), r"tokenizer\.json"),
    "the tokenizer's limit is a text": (
        field("tokenizer_config.json", model_max_length="long"),
        r"tokenizer_config\.json: `model_max_length` must be a number, not 'long'",
    ),
    "modules.json is truncated": (cut("modules.json"), r"modules\.json cannot be read"),
    "modules.json is not an array": (
        lambda folder: write(folder / "modules.json", "{}"),
        r"modules\.json does not hold",
    ),
    "modules.json lists texts": (lambda folder: write(folder / "modules.json", '["Pooling"]'), r"modules\.json does"),
    "an unknown module": (
        modules((1, "type", MODULE + "Telepathy")),
        r"modules\.json: the module 'sentence_transformers\.models\.Telepathy' is not supported",
    ),
    "a module of another package": (modules((0, "type", "custom_st.Transformer")), r"'custom_st\.Transformer' is not"),
    "a module that is a number": (modules((0, "type", 7)), r"modules\.json: `type` must be a string"),
    "no pooling": (keep_modules(0, 4), r"modules\.json: the modules must be a Transformer and a Pooling"),
    "two poolings": (keep_modules(0, 1, 1), r"modules\.json: the modules must be a Transformer and a Pooling"),
    "a layer before the pooling": (
        keep_modules(0, 2, 1),
        r"modules\.json: the modules must be a Transformer and a Pooling",
    ),
    "a relative path out of the checkpoint": (
        modules((1, "path", "../model/1_Pooling")),
        r"modules\.json: '\.\./model/1_Pooling' leads out",
    ),
    "an absolute path": (modules((1, "path", "/etc")), r"modules\.json: '/etc' leads out"),
    "a path to a missing folder": (modules((2, "path", "elsewhere")), r"elsewhere/config\.json is missing"),
    "no config of the pooling": (remove("1_Pooling/config.json"), r"1_Pooling/config\.json is missing"),
    "an unknown pooling mode": (field("1_Pooling/config.json", pooling_mode="median"), r"`pooling_mode` must be"),
    "unknown pooling modes": (field("1_Pooling/config.json", pooling_mode=["mean", 3]), r"`pooling_mode` must"),
    "a pooling mode that is a number": (field("1_Pooling/config.json", pooling_mode=3), r"`pooling_mode` must be"),
    "arguments that override config.json": (
        field("sentence_bert_config.json", config_kwargs={"num_hidden_layers": 1}),
        r"sentence_bert_config\.json: `config_kwargs` must be empty: set these in config\.json",
    ),
    "arguments that override tokenizer_config.json": (
        field("sentence_bert_config.json", tokenizer_args={"trust_remote_code": True, "do_lower_case": False}),
        r"sentence_bert_config\.json: `tokenizer_args` must be empty",
    ),
    "the token vectors of an earlier layer": (
        field(
            "sentence_bert_config.json",
            modality_config={"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}},
        ),
        r"sentence_bert_config\.json: `modality_config` must be \{'text'",
    ),
    "a model that ranks pairs": (
        field("config_sentence_transformers.json", model_type="CrossEncoder"),
        r"config_sentence_transformers\.json: `model_type` must be 'SentenceTransformer'",
    ),
    "vectors of no length": (
        field("config_sentence_transformers.json", truncate_dim=0),
        r"config_sentence_transformers\.json: `truncate_dim` must be a positive integer, not 0",
    ),
    "a layer with an output of its own": (
        field("2_Dense/config.json", module_output_name="other"),
        r"2_Dense/config\.json: `module_output_name` must be 'sentence_embedding': .* pooled vector only",
    ),
    "an activation of another package": (
        field("2_Dense/config.json", activation_function="os.system"),
        r"2_Dense/config\.json: the activation 'os\.system' is not one of torch\.nn",
    ),
    "an activation that is a function": (
        field("2_Dense/config.json", activation_function="torch.nn.functional.relu"),
        r"2_Dense/config\.json: .*relu",
    ),
    "an activation that is a layer": (
        field("2_Dense/config.json", activation_function="torch.nn.Linear"),
        r"2_Dense/config\.json: .*Linear",
    ),
    "a residual": (field("2_Dense/config.json", use_residual=True), r"2_Dense/config\.json: .* without residual only"),
    "a layer over token vectors": (
        field("2_Dense/config.json", module_input_name="token_embeddings"),
        r"2_Dense/config\.json: `module_input_name` must be 'sentence_embedding': .* pooled vector only",
    ),
    "a normalization of token vectors": (
        field("4_Normalize/config.json", module_input_name="token_embeddings"),
        r"4_Normalize/config\.json: `module_input_name` must be 'sentence_embedding': .* pooled vector only",
    ),
    "a normalization with an output of its own": (
        field("4_Normalize/config.json", module_output_name="other"),
        r"4_Normalize/config\.json: `module_output_name` must be 'sentence_embedding': .* pooled vector only",
    ),
    "a length that is a text": (field("2_Dense/config.json", out_features="16"), r"`out_features` must be a positive"),
    "a length of zero": (field("3_LayerNorm/config.json", dimension=0), r"`dimension` must be a positive integer"),
    "a prompt that is a number": (
        field("config_sentence_transformers.json", prompts={"query": 5}),
        r"config_sentence_transformers\.json: `query` must be a string, not 5",
    ),
    "a default prompt that does not exist": (
        field("config_sentence_transformers.json", default_prompt_name="sts"),
        r"config_sentence_transformers\.json: `default_prompt_name` must be one of 'document', 'query', not 'sts'",
    ),
    "a limit that is a text": (field("sentence_bert_config.json", max_seq_length="512"), r"`max_seq_length` must be"),
    "a limit that leaves no room": (field("sentence_bert_config.json", max_seq_length=1), r"no room for text"),
    "a chat template": (
        field("sentence_bert_config.json", modality_config={"message": {}}),
        r"sentence_bert_config\.json: chat templates around texts are not supported",
    ),
    "another task": (
        field("sentence_bert_config.json", transformer_task="fill-mask"),
        r"`transformer_task` must be 'feature-extraction'",
    ),
    "an adapter next to its model": (lambda folder: write(folder / "adapter_config.json", "{}"), r"holds an adapter"),
    "an adapter": (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), r"holds an adapter"),
}


@pytest.mark.parametrize(("damage", "reason"), WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights_are_refused(folder: Path, damage: Damage, reason: str) -> None:
    damage(folder)

    assert re.search(reason, refused(folder))


@pytest.mark.parametrize("folder", ["e5"], indirect=True)  # configs are read before the backend is chosen
@pytest.mark.parametrize(("damage", "reason"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_invalid_configs_are_refused(folder: Path, damage: Damage, reason: str) -> None:
    damage(folder)

    assert re.search(reason, refused(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"hidden_size": -1},
        {"hidden_size": 33},
        {"hidden_size": 10**12},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_attention_heads": [4]},
        {"intermediate_size": 1.5},
        {"vocab_size": 7},
        {"vocab_size": True},
        {"max_position_embeddings": "64"},
        {"hidden_act": "telepathy"},
        {"hidden_act": 5},
    ],
    ids=str,
)
def test_a_config_that_is_absurd_or_contradicts_its_weights_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "config.json", **changes)

    refused(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            tensors("model-00001-of-00004.safetensors", lambda found: found.pop("latent_attention_model.latents")),
            r"tensors are missing: latent_attention_model\.latents",
            id="no latents",
        ),
        pytest.param(
            remove("model-00004-of-00004.safetensors"),
            r"model-00004-of-00004\.safetensors",
            id="a shard is missing",
        ),
        pytest.param(
            cut("model-00002-of-00004.safetensors"), r"model-00002-of-00004\.safetensors", id="a truncated shard"
        ),
        pytest.param(
            field("config.json", text_config=None),
            r"config\.json: `text_config` must be an object",
            id="no text_config",
        ),
        pytest.param(
            field("config.json", latent_attention_config=[]),
            r"config\.json: `latent_attention_config` must be an object",
            id="a latent_attention_config that is an array",
        ),
        pytest.param(
            field("config.json", latent_attention_config={"latent_dim": 4096}),
            r"tensors have another shape than config\.json says: latent_attention_model\.",
            id="a latent attention of another size",
        ),
        pytest.param(
            field("config.json", latent_attention_config={"num_cross_heads": "two"}),
            r"cannot be run: .*'two'",
            id="a size that is not a number",
        ),
        pytest.param(
            field("model.safetensors.index.json", weight_map=[]),
            r"model\.safetensors\.index\.json: `weight_map` must be an object",
            id="an index without files",
        ),
        pytest.param(
            field("model.safetensors.index.json", weight_map={"norm.weight": "../model.safetensors"}),
            r"model\.safetensors\.index\.json: `weight_map` must name files in the same folder",
            id="a path out of the checkpoint",
        ),
    ],
)
def test_nv_embed_without_all_of_its_parts_is_refused(nv_embed: Path, damage: Damage, reason: str) -> None:
    damage(nv_embed)

    assert re.search(reason, refused(nv_embed))


def test_weights_without_read_permission_are_reported_as_that(nv_embed: Path) -> None:
    (weights, *_) = nv_embed.glob("*.safetensors")
    weights.chmod(0)
    if os.access(weights, os.R_OK):
        pytest.skip("file permissions do not apply to this user")
    assert re.search(r"\.safetensors: the weights cannot be read: .*Permission denied", refused(nv_embed))


STATIC: dict[str, tuple[Damage, str]] = {
    "no weights": (remove("model.safetensors"), r"model\.safetensors is missing"),
    "truncated weights": (cut("model.safetensors"), r"model\.safetensors: the weights cannot be read"),
    "no token vectors": (tensors("model.safetensors", dict.clear), r"neither `embedding\.weight`, nor model2vec's"),
    "one token vector": (
        tensors("model.safetensors", lambda found: found.update({"embedding.weight": torch.ones(3)})),
        r"neither `embedding\.weight`, nor model2vec's",
    ),
    "token weights for another number of tokens": (
        tensors(
            "model.safetensors",
            lambda found: found.update({"embeddings": found.pop("embedding.weight"), "weights": torch.ones(7)}),
        ),
        r"the model cannot be run",
    ),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer\.json: the tokenizer cannot be read"),
    "a pooling": (
        lambda folder: write(
            folder / "modules.json",
            json.dumps(
                [
                    {"path": path, "type": f"sentence_transformers.models.{kind}"}
                    for path, kind in (("", "StaticEmbedding"), ("1_Pooling", "Pooling"))
                ]
            ),
        ),
        r"the modules must be a Transformer and a Pooling, or a StaticEmbedding",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), STATIC.values(), ids=STATIC)
def test_invalid_static_embeddings_are_refused(tmp_path: Path, damage: Damage, reason: str) -> None:
    save_static(tmp_path)
    damage(tmp_path)

    assert re.search(reason, refused(tmp_path))


@pytest.mark.parametrize("template", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_plain_model_with_a_chat_template_is_refused(tmp_path: Path, template: str) -> None:
    save_plain(tmp_path, "bert", AutoModel, **SMALL)
    content = "{% for message in messages %}{{ message.content }}{% endfor %}"
    if template == "tokenizer_config.json":
        edit(tmp_path / template, chat_template=content)
    else:
        write(tmp_path / template, content)

    assert "has a chat template and no modules.json" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "llama_bidirec"])
def test_a_plain_reranker_is_refused(tmp_path: Path, kind: str) -> None:
    save_plain(tmp_path, "bert", AutoModelForSequenceClassification, num_labels=1, **SMALL)
    edit(tmp_path / "config.json", model_type=kind)

    assert "config.json: a model that gives one score, such as a reranker, makes no vectors" in refused(tmp_path)


def test_colbert_is_refused_instead_of_pooled(tmp_path: Path) -> None:
    save_plain(tmp_path, "bert", AutoModel, **SMALL)
    edit(tmp_path / "config.json", architectures=["HF_ColBERT"])

    assert "config.json: ColBERT makes a vector per token, and none per text" in refused(tmp_path)


@pytest.mark.parametrize("field", ["architectures", "is_causal"])
def test_a_plain_model_with_an_invalid_architecture_is_refused(tmp_path: Path, field: str) -> None:
    save_plain(tmp_path, "bert", AutoModel, **SMALL)
    edit(tmp_path / "config.json", **({"architectures": ["BertForCausalLM"]} | {field: 5}))

    assert f"config.json: `{field}` must be " in refused(tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        {"model_type": "clip", "text_config": {}, "vision_config": {}},
        {"model_type": "vision-encoder-decoder", "encoder": {}, "decoder": {}},
        {"model_type": "t5gemma", "encoder": {"hidden_size": WIDTH}, "decoder": {"hidden_size": WIDTH}},
    ],
    ids=lambda parts: parts["model_type"],
)
def test_a_model_of_several_parts_is_refused(tmp_path: Path, parts: dict[str, object]) -> None:
    write(tmp_path / "config.json", json.dumps(parts))

    assert "config.json: a model of several parts, such as one for texts and images, is not" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["blenderbot", "pegasus"])
def test_an_encoder_decoder_model_that_cannot_be_split_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    save_plain(tmp_path, kind, AutoModel, d_model=WIDTH, encoder_layers=1, decoder_layers=1, pad_token_id=0)

    assert f"config.json: encoder halves of '{kind}' are not supported; supported are those of" in refused(tmp_path)


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({}, ": tensors are missing: bias, weight"),
        ({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, ": tensors have another shape than config.json says"),
        ({"weight": "a text"}, " is damaged, or holds something besides tensors"),
    ],
    ids=["empty", "another shape", "not a tensor"],
)
def test_a_wrong_layer_of_bge_m3_is_refused(tmp_path: Path, name: str, layer: dict[str, object], reason: str) -> None:
    folder = Path(shutil.copytree(family("bge-m3").folder, tmp_path / "model"))
    torch.save(layer, folder / name)

    assert f"{name}{reason}" in refused(folder)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_tokenizer_that_needs_a_missing_package_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = Path(shutil.copytree(family("bge-m3").folder, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed

    with pytest.raises(MissingDependency) as error:
        load_encoder("test/sentencepiece", folder)
    assert error.value.message == (
        f"{folder / 'tokenizer.json'}: the tokenizer cannot be read: it is missing, and sentencepiece.bpe.model needs "
        "packages: pip install sentencepiece protobuf"
    )


def test_a_tokenizer_of_another_model_is_refused_at_the_first_token_without_an_embedding(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5000, "content": "[FOREIGN]"})
    write(folder / "tokenizer.json", json.dumps(tokenizer))
    encoder = load_encoder("test/foreign", folder)

    assert encode(encoder, ["water"], input_type="query").vectors.shape == (1, 16)
    with pytest.raises(
        CheckpointInvalid, match=r"makes token \d+ of text 1, but the model has embeddings for only \d+"
    ):
        encode(encoder, ["water", "water [FOREIGN]"], input_type="query")


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "missing")
    write(tmp_path / "file", "")
    assert "is not a folder" in refused(tmp_path / "file")


# --- code that comes with a checkpoint -------------------------------------------------------------------------------


class Trap:
    """An object whose pickle makes a folder when it is loaded without `weights_only`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickle_dump(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
@pytest.mark.parametrize("writer", [torch.save, pickle_dump], ids=["by torch", "by pickle"])
def test_code_in_a_pickle_is_not_run(
    folder: Path, tmp_path: Path, name: str, writer: Callable[[object, Path], None]
) -> None:
    (folder / name).with_name("model.safetensors").unlink()
    writer({"linear.weight": Trap(tmp_path / "sprung")}, folder / name)

    assert f"{name} is damaged, or holds something besides tensors" in refused(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("model_type", ["bert", "ministral3", "quantum-bert", "vit", "clap_text_model"])
@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.txt"])
def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, tokenizer: str
) -> None:
    write(folder / "modeling_trap.py", f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass Trap: pass\n")
    trap = "modeling_trap.Trap"
    edit(folder / "config.json", model_type=model_type, auto_map={"AutoConfig": trap, "AutoModel": trap})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [trap, trap]})
    if tokenizer == "vocab.txt":
        (folder / "tokenizer.json").unlink()
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)

    with contextlib.suppress(CheckpointInvalid):
        load_encoder("test/trap", folder)

    assert questions == []
    assert not (tmp_path / "sprung").exists()


def test_a_known_architecture_with_code_of_its_own_runs_on_transformers_class_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = encode(load_encoder("test/plain", folder), ["water"], input_type="query").vectors
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"})

    with caplog.at_level(logging.WARNING):
        own = encode(load_encoder("test/own", folder), ["water"], input_type="query").vectors

    np.testing.assert_array_equal(own, plain)
    assert "names code of its own" in caplog.text


def test_an_architecture_that_needs_code_of_its_own_is_refused_with_that_advice(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"})
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(layer_weight(tensors)))

    assert re.search(r"tensors are missing: .*; it may need the code that its config\.json names", refused(folder))


def test_an_attention_implementation_that_a_config_names_is_not_fetched(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="somebody/kernels", _attn_implementation="somebody/kernels")

    assert encode(load_encoder("test/kernels", folder), ["water"], input_type="query").vectors.shape == (1, 16)


def test_a_vocabulary_without_its_unknown_token_fails_only_on_texts_that_need_it(tmp_path: Path) -> None:
    save_static(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    del tokenizer["model"]["vocab"]["[UNK]"]
    write(tmp_path / "tokenizer.json", json.dumps(tokenizer))
    encoder = load_encoder("test/broken", tmp_path)

    assert encode(encoder, ["water"], truncate="END").vectors.shape == (1, WIDTH)
    with pytest.raises(CheckpointInvalid, match=r"tokenizer has no tokens for a text: .*UNK"):
        encode(encoder, ["water", "☃"], truncate="END")


# --- random changes --------------------------------------------------------------------------------------------------

NAMES = (
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "3_LayerNorm/config.json",
)
JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        False,
        -1,
        0,
        1,
        3,
        64,
        1000,
        10**12,
        0.5,
        1e30,
        "",
        "a",
        "../x",
        "\x00",
        [],
        ["a"],
        [[]],
        {},
        {"a": 1},
    ]
) | st.text(max_size=5)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Functions that replace or delete one part of a JSON value."""
    choose = draw(st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
    junk, delete = draw(JUNK), draw(st.booleans())

    def change(value: Any) -> Any:
        number, *deeper = choose
        if not isinstance(value, dict | list) or not value:
            return junk
        key: Any = sorted(value)[number % len(value)] if isinstance(value, dict) else number % len(value)
        if deeper and number % 5 and isinstance(value[key], dict | list):
            choose.pop(0)
            value[key] = change(value[key])
        elif delete:
            del value[key]
        else:
            value[key] = junk
        return value

    return change


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(change=mutations())
def test_a_checkpoint_with_randomly_changed_configs_works_or_is_refused(
    base: FamilyName, name: str, sound: dict[FamilyName, Path], change: Callable[[Any], Any]
) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(sound[base], Path(parent) / "model"))
        changed = change(json.loads((folder / name).read_text(encoding="utf-8")))
        write(folder / name, json.dumps(changed))

        try:
            encoder = load_encoder("test/changed", folder)
            embedded = encode(encoder, ["water", "Der Kaffee ist kalt. " * 20], input_type="query", truncate="END")
        except (CheckpointInvalid, InvalidRequest):  # the latter if a prompt leaves no room for text
            return
        assert embedded.vectors.shape == (2, encoder.info.dimensions)
        assert np.isfinite(embedded.vectors).all()
