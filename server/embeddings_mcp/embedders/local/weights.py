"""Tensors out of a checkpoint's files, and whether they are the right ones.

Of a pickle only tensors are read; nothing in it is run.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open

from embeddings_mcp.embedders.local.json_file import read_object
from embeddings_mcp.errors import CheckpointInvalid

SPARE = ("pooler.", "lm_head.", "cls.", "classifier.")
"""Starts of the names of heads that a checkpoint may have or not: no embedding is made with them."""

_BUFFERS = frozenset({"position_ids", "token_type_ids", "masked_bias"})
"""Last parts of the names of numbers that are the same in every model, which older versions of transformers saved."""

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_weights(folder: Path) -> list[Path]:
    """The files with a checkpoint's tensors: one, or the shards that an index names; pickles only without safetensors.

    Raises:
        CheckpointInvalid: a file is missing, or broke off; names it.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointInvalid(
            f"{folder / _FILES[0]} is missing; weights for other programs (ONNX, GGUF) are not read"
        )
    files = _shards(path) if path.name.endswith(".index.json") else [path]
    for file in files:
        if not file.is_file():
            raise CheckpointInvalid(f"{file} is missing")
        if file.suffix == ".safetensors":
            try:
                # Of a file that nobody may read safetensors says that it is not there; this says what is so.
                with file.open("rb"), safe_open(file, framework="pt"):
                    pass  # it has looked whether the file is as long as its header says
            except (OSError, SafetensorError) as error:
                raise CheckpointInvalid(f"{file}: the weights cannot be read: {error}") from error
    return files


def _shards(index: Path) -> list[Path]:
    description = read_object(index)
    names = description.get("weight_map", {}).values()
    if not names or not all(isinstance(name, str) and name == PurePath(name).name for name in names):
        raise CheckpointInvalid(f"{index}: `weight_map` must name files beside it")
    return [index.with_name(name) for name in sorted(set(names))]


def without_heads(names: Collection[str], prefixes: tuple[str, ...]) -> set[str]:
    """Of a checkpoint's tensors those of the model itself.

    Args:
        names: of all of them.
        prefixes: what may stand before the model's own, in a checkpoint that was saved with a head, and only there.
    """
    return {name for name in names if name.startswith(prefixes)} or set(names)


def tensor_names(folder: Path) -> set[str]:
    """The names of a checkpoint's tensors.

    Raises:
        CheckpointInvalid: as `read_tensors`, but for damage behind the header of a safetensors file.
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
    """The tensors of a checkpoint whose names start with `prefix`, under their whole names.

    Raises:
        CheckpointInvalid: a file is missing, or damaged; names it.
    """
    parts = [read_tensors_file(path, prefix) for path in find_weights(folder)]
    return {name: tensor for part in parts for name, tensor in part.items()}


def read_tensors_file(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """As `read_tensors`, from one file.

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
    except Exception as error:  # a pickle can be wrong in any way, and PyTorch's reasons end in advice to trust it
        raise CheckpointInvalid(
            f"{path} is damaged, or holds something besides tensors: code in a checkpoint is never run"
        ) from error


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is no tensor")
    return tensors


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
    wanted = {f"{prefix}{name}": tensor.shape for name, tensor in module.state_dict().items()}
    check_tensors(
        path,
        missing=wanted.keys() - tensors.keys(),
        extra=tensors.keys() - wanted.keys(),
        misshapen={name for name in wanted.keys() & tensors.keys() if tensors[name].shape != wanted[name]},
    )
    given = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}
    module.load_state_dict(given, assign=True)


def check_tensors(
    folder: Path, *, missing: Collection[str], extra: Collection[str], misshapen: Collection[str]
) -> None:
    """Refuse a checkpoint whose tensors are not those that its config calls for.

    Heads may be there or not, and so may numbers that older versions of transformers saved.

    Raises:
        CheckpointInvalid: names the folder, the tensors, and what is wrong with them.
    """
    for finding, names in (
        ("are missing", missing),
        ("are not part of the architecture", {name for name in extra if name.rpartition(".")[2] not in _BUFFERS}),
        ("have another shape than config.json says", misshapen),
    ):
        wrong = sorted(name for name in names if not name.startswith(SPARE))
        if wrong:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise CheckpointInvalid(f"{folder}: tensors {finding}: {shown}")
