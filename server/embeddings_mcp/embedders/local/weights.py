"""Weights of our own small modules, from a checkpoint's files; of a pickle only tensors are read, nothing is run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from embeddings_mcp.errors import CheckpointInvalid


def load_weights(module: torch.nn.Module, folder: Path, *, prefix: str) -> None:
    """Give a module the tensors whose names start with `prefix`, in float32.

    They are looked for in ``model.safetensors``, in its shards, and in ``pytorch_model.bin``.

    Raises:
        CheckpointInvalid: a file is missing or damaged, or its tensors are not those of the module; names the file.
    """
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        if (folder / name).is_file():
            load_weights_file(module, folder / name, prefix=prefix)
            return
    raise CheckpointInvalid(f"{folder / 'model.safetensors'} is missing")


def load_weights_file(module: torch.nn.Module, path: Path, *, prefix: str = "") -> None:
    """As `load_weights`, from one file or from the shards that an index names.

    Raises:
        CheckpointInvalid: the file is missing or damaged, or its tensors are not those of the module.
    """
    try:
        if path.name.endswith(".index.json"):
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = {path.parent / shard for name, shard in places.items() if name.startswith(prefix)}
            tensors = _from_safetensors(sorted(shards), prefix)
        elif path.suffix == ".safetensors":
            tensors = _from_safetensors([path], prefix)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {name: tensor for name, tensor in loaded.items() if name.startswith(prefix)}
        module.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()})
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise CheckpointInvalid(f"{path}: the weights cannot be used: {error}") from error


def _from_safetensors(paths: Iterable[Path], prefix: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return tensors
