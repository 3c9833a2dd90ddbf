"""Fingerprint a checkpoint: identify the vectors that it makes by its files and its number format.

Does not import torch where it can be avoided: a fingerprint is computed before the model is loaded, and often the model
is then not loaded at all.
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
    """Return a SHA-256 that two checkpoints share only if they make the same vectors, wherever they are stored.

    It includes this package's version, since another version may read the same files differently.

    Args:
        checkpoint: the checkpoint.
        precision: the number format, as returned by `number_format`.
        digest: identifies a file's content: `file_digest`, or within the lifetime of a process `file_state`.

    Raises:
        CheckpointInvalid: a file cannot be read.
        OSError: a folder cannot be listed.
    """
    pipeline = checkpoint.pipeline
    modules = [stage.folder for stage in pipeline.stages if isinstance(stage, Dense | LayerNorm)]
    folders = {checkpoint.folder, pipeline.backbone, *modules}
    # Not with glob: since Python 3.12 it finds nothing in a folder that cannot be opened, instead of raising.
    entries = [path for folder in folders for path in folder.iterdir()]
    paths = [path for path in entries if any(path.match(pattern) for pattern in (*FILE_PATTERNS, PICKLE_PATTERN))]
    try:
        files = {os.path.relpath(path, checkpoint.folder): digest(path) for path in paths}
    except OSError as error:
        raise CheckpointInvalid(f"{error.filename} cannot be read: {error.strerror}") from error
    stages = [type(stage).__name__ for stage in pipeline.stages]
    identity = [__version__, precision, pipeline.pooling, pipeline.pool_prompt, stages, sorted(files.items())]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def file_state(path: Path) -> str:
    """Return a file's path, device, inode, size and times, which differ once its content may have changed.

    The modification time alone is not enough, since archive tools set it back; no tool sets back the change time of the
    inode (ctime).
    """
    state = path.stat()
    return f"{path.resolve()} {state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; a gigabyte takes half a second."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def number_format(precision: Precision, device: str) -> Precision:
    """Resolve ``auto``: bfloat16 on CUDA devices that support it (Ampere and later), float32 elsewhere.

    Args:
        precision: ``auto``, or a format, which is returned unchanged.
        device: ``auto``, or a torch device.
    """
    if precision != "auto":
        return precision
    on_cuda = device == "auto" or device.startswith("cuda")
    return "bfloat16" if on_cuda and _cuda_has_bfloat16() else "float32"


def _cuda_has_bfloat16() -> bool:
    """Return whether PyTorch can use a GPU that supports bfloat16 natively."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    # Rule out a GPU without importing torch if possible: the import takes seconds, and memory until the process ends.
    if sys.platform == "darwin" or version.endswith("+cpu") or not ("+rocm" in version or _has_cuda_driver()):
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_cuda_driver() -> bool:
    """Return whether NVIDIA's driver is installed; PyTorch loads it by the same names."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
