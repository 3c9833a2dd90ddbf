"""Tensors out of a checkpoint's files, and whether they are the right ones.

Of a pickle only tensors are read; nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open

from embeddings_mcp.errors import CheckpointInvalid

SPARE = ("pooler.", "lm_head.", "cls.", "classifier.", "vocab_transform.", "vocab_layer_norm.")
"""Starts of the names of heads that a checkpoint may have or not: no embedding is made with them."""

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, under their whole names.

    They are looked for in ``model.safetensors``, in its shards, and only then in pickles.

    Raises:
        CheckpointInvalid: there is no such file, or it is damaged; names it.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointInvalid(f"{folder / _FILES[0]} is missing")
    return read_tensors_file(path, prefix)


def read_tensors_file(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """As `read_tensors`, from one file, or from the shards that an index names.

    Raises:
        CheckpointInvalid: the file is missing or damaged; names it.
    """
    try:
        if path.name.endswith(".index.json"):
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = {str(shard) for name, shard in places.items() if name.startswith(prefix)}
            parts = [read_tensors_file(path.parent / Path(shard).name, prefix) for shard in sorted(shards)]
            return {name: tensor for part in parts for name, tensor in part.items()}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    except CheckpointInvalid:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise CheckpointInvalid(f"{path}: the weights cannot be read: {error}") from error


def load_weights(module: torch.nn.Module, path: Path, *, prefix: str = "") -> None:
    """Give a module of ours its tensors, in float32: all those of a checkpoint that start with `prefix`.

    Args:
        module: has parameters of the names that follow the prefix.
        path: a checkpoint's folder, or one of its files.
        prefix: start of the names.

    Raises:
        CheckpointInvalid: a file is missing or damaged, or its tensors are not those of the module; names the file.
    """
    tensors = read_tensors(path, prefix) if path.is_dir() else read_tensors_file(path, prefix)
    try:
        module.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise CheckpointInvalid(f"{path}: the weights cannot be used: {error}") from error


def check_tensors(
    folder: Path, *, missing: Collection[str], extra: Collection[str], misshapen: Collection[str]
) -> None:
    """Refuse a checkpoint whose tensors are not those that its config calls for; heads may be there or not.

    Raises:
        CheckpointInvalid: names the folder, the tensors, and what is wrong with them.
    """
    for finding, names in (
        ("are missing", missing),
        ("are not part of the architecture", extra),
        ("have another shape than config.json says", misshapen),
    ):
        wrong = sorted(name for name in names if not name.startswith(SPARE))
        if wrong:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise CheckpointInvalid(f"{folder}: tensors {finding}: {shown}")
