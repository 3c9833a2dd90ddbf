"""Read tensors from a checkpoint's files, and check that they match the architecture.

Pickles are read with ``weights_only``, and may hold nothing but tensors: nothing in them is executed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open

from embeddings_mcp.embedders.local.json_file import read_object
from embeddings_mcp.errors import CheckpointInvalid

_HEAD_PREFIXES = ("pooler.", "lm_head.", "cls.", "classifier.")
"""Name prefixes of heads that a checkpoint may or may not have; embeddings do not use them."""

_BUFFERS = frozenset({"position_ids", "token_type_ids", "masked_bias"})
"""Last components of the names of constant buffers that older versions of transformers saved."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_weights(folder: Path) -> list[Path]:
    """Return the files with a checkpoint's tensors: one, or the shards in an index; pickles only without safetensors.

    Raises:
        CheckpointInvalid: a file is missing, truncated or not readable; names it.
    """
    path = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointInvalid(
            f"{folder / _WEIGHT_FILES[0]} is missing; weights for other programs (ONNX, GGUF) are not read"
        )
    files = _shards(path) if path.name.endswith(".index.json") else [path]
    for file in files:
        if not file.is_file():
            raise CheckpointInvalid(f"{file} is missing")
        if file.suffix == ".safetensors":
            try:
                # safetensors reports a file without read permission as missing; `open` gives the true reason.
                with file.open("rb"), safe_open(file, framework="pt"):
                    pass  # opening compares the length of the file with its header
            except (OSError, SafetensorError) as error:
                raise CheckpointInvalid(f"{file}: the weights cannot be read: {error}") from error
    return files


def _shards(index: Path) -> list[Path]:
    """Return the shards that an index names, which must be in its folder."""
    names = read_object(index).get("weight_map", {}).values()
    if not names or not all(isinstance(name, str) and name == PurePath(name).name for name in names):
        raise CheckpointInvalid(f"{index}: `weight_map` must name files in the same folder")
    return [index.with_name(name) for name in sorted(set(names))]


def without_heads(names: Collection[str], prefixes: tuple[str, ...]) -> set[str]:
    """Return the names of the model's own tensors, without those of a head.

    Args:
        names: names of all tensors of a checkpoint.
        prefixes: possible prefixes of the model's own tensors; only checkpoints saved with a head have one.
    """
    return {name for name in names if name.startswith(prefixes)} or set(names)


def tensor_names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's tensors.

    Raises:
        CheckpointInvalid: as in `read_tensors`, except for damage after the header of a safetensors file.
    """
    names: set[str] = set()
    for path in find_weights(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        else:
            names.update(read_tensors_file(path))
    return names


def read_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint whose names start with `prefix`, under their full names.

    Raises:
        CheckpointInvalid: a file is missing, or damaged; names it.
    """
    parts = [read_tensors_file(path, prefix) for path in find_weights(folder)]
    return {name: tensor for part in parts for name, tensor in part.items()}


def read_tensors_file(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Like `read_tensors`, for a single file.

    Raises:
        CheckpointInvalid: the file is missing or damaged; names it.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        return {name: tensor for name, tensor in _unpickle(path).items() if name.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(f"{path}: the weights cannot be read: {error}") from error
    except Exception as error:  # a pickle can fail in any way, and PyTorch's messages advise to trust the file
        raise CheckpointInvalid(
            f"{path} is damaged, or holds something besides tensors: code in a checkpoint is never run"
        ) from error


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a pickle of named tensors.

    Raises:
        Exception: in one of many classes, if it is damaged or holds anything else.
    """
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is not a tensor")
    return tensors


def load_weights(module: torch.nn.Module, path: Path, *, prefix: str = "") -> None:
    """Load the parameters of a module of ours, in float32, from all tensors of a checkpoint that start with `prefix`.

    Args:
        module: its parameters have the tensors' names without the prefix.
        path: a checkpoint's folder, or one of its files.
        prefix: prefix of the tensors' names.

    Raises:
        CheckpointInvalid: a file is missing or damaged, or its tensors do not match the module; names the file.
    """
    tensors = read_tensors(path, prefix) if path.is_dir() else read_tensors_file(path, prefix)
    expected = {f"{prefix}{name}": tensor.shape for name, tensor in module.state_dict().items()}
    check_tensors(
        path,
        missing=expected.keys() - tensors.keys(),
        extra=tensors.keys() - expected.keys(),
        misshapen={name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name]},
    )
    state = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)


def check_tensors(
    folder: Path, *, missing: Collection[str], extra: Collection[str], misshapen: Collection[str]
) -> None:
    """Reject a checkpoint whose tensors do not match its config.

    Heads may be present or absent, and so may the constant buffers that older versions of transformers saved.

    Raises:
        CheckpointInvalid: names the folder, the tensors, and what is wrong with them.
    """
    for problem, names in (
        ("are missing", missing),
        ("are not part of the architecture", {name for name in extra if name.rpartition(".")[2] not in _BUFFERS}),
        ("have another shape than config.json says", misshapen),
    ):
        relevant = sorted(name for name in names if not name.startswith(_HEAD_PREFIXES))
        if relevant:
            shown = ", ".join(relevant[:3]) + (f" and {len(relevant) - 3} more" if len(relevant) > 3 else "")
            raise CheckpointInvalid(f"{folder}: tensors {problem}: {shown}")
