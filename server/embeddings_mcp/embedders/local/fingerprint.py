"""What tells a checkpoint's vectors from those of another: the files that make them, and the numbers they are made in.

Without torch, since it is asked before a model is loaded, and often in its place.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from embeddings_mcp import __version__
from embeddings_mcp.embedders.local.checkpoint import FILE_PATTERNS, PICKLE_PATTERN, Checkpoint
from embeddings_mcp.embedders.local.pipeline import Dense, LayerNorm
from embeddings_mcp.errors import CheckpointInvalid
from embeddings_mcp.models import Precision


def fingerprint(checkpoint: Checkpoint, *, precision: str, digest: Callable[[Path], str]) -> str:
    """The same for two checkpoints only if they make the same vectors, wherever they are.

    This package's version is part of it, since another version may read the same files in another way.

    Args:
        checkpoint: as it was read.
        precision: the number format, as `number_format` says it.
        digest: makes of a file what tells it from others: `file_digest`, or for the life of a process `file_state`.

    Raises:
        CheckpointInvalid: a file cannot be read.
        OSError: a folder cannot be listed.
    """
    pipeline = checkpoint.pipeline
    modules = [stage.folder for stage in pipeline.stages if isinstance(stage, Dense | LayerNorm)]
    folders = {checkpoint.folder, pipeline.backbone, *modules}
    # Not by glob, which from Python 3.12 on finds nothing in a folder that the system cannot open now.
    there = [path for folder in folders for path in folder.iterdir()]
    paths = [path for path in there if any(path.match(pattern) for pattern in (*FILE_PATTERNS, PICKLE_PATTERN))]
    try:
        files = {os.path.relpath(path, checkpoint.folder): digest(path) for path in paths}
    except OSError as error:
        raise CheckpointInvalid(f"{error.filename} cannot be read: {error.strerror}") from error
    stages = [type(stage).__name__ for stage in pipeline.stages]
    said = [__version__, precision, pipeline.pooling, pipeline.pool_prompt, stages, sorted(files.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def file_state(path: Path) -> str:
    """Which file this is and when it was changed: never the same again once its content may be another.

    The time of the last change of its entry is what no tool sets back, as archives do with that of its content.
    """
    state = path.stat()
    return f"{path.resolve()} {state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def file_digest(path: Path) -> str:
    """The SHA-256 of the file's content; a gigabyte takes half a second."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def number_format(precision: Precision, device: str) -> Precision:
    """What ``auto`` means: bfloat16 on CUDA, where it computes in it (from Ampere on), and float32 elsewhere.

    Args:
        precision: ``auto``, or a format, which stays what it is.
        device: ``auto``, or a torch device.
    """
    if precision != "auto":
        return precision
    on_cuda = device == "auto" or device.startswith("cuda")
    return "bfloat16" if on_cuda and _cuda_has_bfloat16() else "float32"


def _cuda_has_bfloat16() -> bool:
    """Whether there is a GPU for PyTorch here, and bfloat16 is among what it computes in."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    # Where it can be known without importing torch, which takes seconds, and memory for as long as the server runs.
    if sys.platform == "darwin" or version.endswith("+cpu") or not ("+rocm" in version or _has_cuda_driver()):
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_cuda_driver() -> bool:
    """Whether NVIDIA's driver is installed, which PyTorch finds by the same names."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
