"""From settings to a service: the one place that knows every kind of embedder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from embeddings_mcp.embedders.local.checkpoint import read_checkpoint
from embeddings_mcp.embedders.local.locate import find_bundled, locate
from embeddings_mcp.embedders.worker import LocalEmbedder
from embeddings_mcp.errors import MissingDependency
from embeddings_mcp.models import CARDS, ModelCard, find_card
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.encoder import Encoder


def build_service(settings: Settings) -> EmbeddingService:
    """A service for the models of these settings; no weights are read yet.

    Raises:
        CheckpointInvalid: a folder given as a model's path is not a checkpoint.
        InvalidSetting: two models answer to one name, or none to the default model's.
    """
    embedders = [_local(spec, settings) for spec in settings.models]
    default = settings.default_model or embedders[0].card.id
    return EmbeddingService(embedders, default_model=default)


def _local(spec: str, settings: Settings) -> LocalEmbedder:
    """The embedder of a model given as ``ID`` or ``ID=PATH``."""
    name, _, path = spec.partition("=")
    known = find_card(name, (*settings.cards, *CARDS))
    name = known.id if known else name
    folder = Path(path).expanduser() if path else None
    described = folder or find_bundled(name)
    card = read_checkpoint(described, known).card(name, known) if described else known or ModelCard(id=name)

    def load() -> Encoder:
        try:
            from embeddings_mcp.embedders.local.encoder import load_encoder
        except ImportError as error:
            raise MissingDependency(
                f"{name} runs on this machine, which needs the package {error.name}: "
                "pip install 'embeddings-mcp[local,bundled]'"
            ) from error
        found = folder or locate(name, card.repository)
        return load_encoder(name, found, known=known, device=settings.device, precision=settings.precision)

    return LocalEmbedder(card, load)
