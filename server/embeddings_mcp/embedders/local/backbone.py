"""The transformer of a checkpoint, and the two ways through it: packed, or padded where the family cannot be packed."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
from collections.abc import Sequence

import torch
import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from embeddings_mcp.embedders.local.attention import NAME, Packing, PackingUnsupported, packed_attention
from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.latent_attention import LATENT_ATTENTION
from embeddings_mcp.errors import CheckpointInvalid

AttentionInterface.register(NAME, packed_attention)

_logger = logging.getLogger(__name__)

PROVEN = frozenset(
    {"bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "nomic_bert", "eurobert"}
    | {"llama", "mistral", "ministral3", "qwen3"}
)
"""Model types whose packed vectors the tests compare with padded ones; any other is compared when it is loaded."""

_ENCODER_HALVES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Architectures of two halves, of which a sentence encoder is one."""

_SPARE_TENSORS = ("pooler.", "lm_head.", "cls.", "classifier.", "vocab_transform.", "vocab_layer_norm.")
"""Heads that a checkpoint may have or not: no embedding is made with them."""


class Backbone:
    """A loaded transformer.

    Args:
        model: the transformer, on its device, with its own attention.
        position_offset: position id of a text's first token.

    Attributes:
        packed: whether texts go through it without padding.
    """

    def __init__(self, model: PreTrainedModel, *, position_offset: int = 0) -> None:
        self._model = model
        self._offset = position_offset
        self._options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        self.packed = self._pack()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.device

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """The token vectors of the texts, one text behind the other.

        Args:
            rows: token ids of each text, none of them empty; neighbours of equal length are attended to together.

        Returns:
            ``[tokens, d]``, and where each text lies in it.
        """
        packing = Packing.of([len(row) for row in rows], self.device)
        return (self._packed(rows, packing) if self.packed else self._padded(rows)), packing

    def _packed(self, rows: Sequence[Sequence[int]], packing: Packing) -> torch.Tensor:
        ids = torch.tensor([list(itertools.chain.from_iterable(rows))], device=self.device)
        numbers = torch.arange(self._offset, self._offset + max(packing.lengths), device=self.device)
        positions = torch.cat([numbers[:length] for length in packing.lengths])[None]
        output = self._model(input_ids=ids, position_ids=positions, packing=packing, **self._options)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        padding = self._model.config.pad_token_id or 0
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        output = self._model(input_ids=ids, attention_mask=mask, **self._options)
        hidden: torch.Tensor = output.last_hidden_state[mask.bool()]
        return hidden

    def _pack(self) -> bool:
        """Give the model the packed attention, if with it the model makes the vectors that it makes alone."""
        if not self._model._can_set_attn_implementation():  # noqa: SLF001 - transformers has no public word for it
            return False
        if self._model.config.model_type in PROVEN:
            self._model.set_attn_implementation(NAME)
            return True
        rows = [
            [1 + (seed * place) % (self._model.config.vocab_size - 1) for place in range(1, seed)] for seed in (6, 11)
        ]
        own = self._model.config._attn_implementation  # noqa: SLF001 - there is a public setter, but no getter
        with torch.inference_mode():
            alone = torch.cat([self._padded([row]) for row in rows]).float()
            self._model.set_attn_implementation(NAME)
            try:
                together = self._packed(rows, Packing.of([len(row) for row in rows], self.device)).float()
                same = bool(torch.nn.functional.cosine_similarity(alone, together).min() > 0.999)
            except (PackingUnsupported, TypeError, RuntimeError) as error:
                _logger.debug("packing failed: %s", error)
                same = False
        if not same:
            self._model.set_attn_implementation(own)
            _logger.info("%s cannot be packed: its texts are padded", self._model.config.model_type)
        return same


def load_backbone(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Load the transformer of a checkpoint, without running any code that came with it.

    Raises:
        CheckpointInvalid: a file is missing or damaged, the architecture is unknown, or a tensor is missing, left over
            or of another shape than its config says.
    """
    folder = checkpoint.pipeline.backbone
    # What it would report is said below, as an error.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    description = dict(checkpoint.backbone_config)
    model_type = str(description.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CheckpointInvalid(
            f"{folder / 'config.json'}: the architecture {model_type!r} is not one that this version of transformers "
            f"({transformers.__version__}) has; code that comes with a checkpoint is never run"
        )
    half = _ENCODER_HALVES.get(model_type)
    architecture = AutoModel if half is None else getattr(transformers, half)
    prefix = checkpoint.recipe.prefix if checkpoint.recipe else ""
    try:
        config = AutoConfig.for_model(model_type, **description)
        model, report = architecture.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and reported below, with the file's name
            key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointInvalid(f"{folder}: the weights cannot be read: {error}") from error
    _check_tensors(checkpoint, report)
    model.pooler = None  # where there is one, its output is not used
    return Backbone(model.eval().to(device), position_offset=checkpoint.position_offset)


def _check_tensors(checkpoint: Checkpoint, report: dict[str, set[str]]) -> None:
    ours = (LATENT_ATTENTION,) if checkpoint.recipe and checkpoint.recipe.latent_attention else ()
    for finding, names in (
        ("are missing", report["missing_keys"]),
        ("are not part of the architecture", report["unexpected_keys"]),
        ("have another shape than config.json says", report["mismatched_keys"]),
    ):
        wrong = sorted(str(name) for name in names if not str(name).startswith((*_SPARE_TENSORS, *ours)))
        if wrong:
            shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise CheckpointInvalid(f"{checkpoint.pipeline.backbone}: tensors {finding}: {shown}")
