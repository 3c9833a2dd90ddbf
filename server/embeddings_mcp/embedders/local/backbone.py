"""Transformers that run as classes of the transformers library, with batches packed, padded or grouped by length."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from embeddings_mcp.embedders.local.attention import NAME, packed_attention
from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.latent_attention import LATENT_ATTENTION
from embeddings_mcp.embedders.local.linear import prepack
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, PackingUnsupported, pack
from embeddings_mcp.embedders.local.placement import Placement, to_device
from embeddings_mcp.embedders.local.sequence_length import rope_parameter_sets
from embeddings_mcp.embedders.local.weights import check_tensors, tensor_names, without_heads
from embeddings_mcp.errors import CheckpointInvalid

AttentionInterface.register(NAME, packed_attention)

_logger = logging.getLogger(__name__)

PROVEN = frozenset(
    {"bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "nomic_bert", "eurobert"}
    | {"llama", "mistral", "ministral3", "qwen3"}
)
"""Model types whose packed vectors are compared with padded ones by the tests; other types are compared when loaded."""

Batching = Literal["packed", "padded", "by length"]
"""How a batch goes through a model: packed without padding, padded, or in one pass for each run of equal lengths."""

_ENCODER_HALVES = {
    "longt5": "LongT5EncoderModel",
    "mt5": "MT5EncoderModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Classes for the encoder half of encoder-decoder architectures, by model type."""

_CAUSAL_MASKS = {
    "codegen": ".attn.causal_mask",
    "gpt_neo": ".attn.attention.bias",
    "gptj": ".attn.bias",
    "openai-gpt": ".attn.bias",
}
"""Name suffixes of causal masks that older transformers versions saved, where the current one does not ignore them."""


class Backbone:
    """A loaded transformer.

    Args:
        model: the transformer, on its device, with its own attention.
        first_position: position id of a text's first token.

    Attributes:
        first_position: the same.
        batching: the cheapest batching that gives every text the same vectors as on its own.
    """

    def __init__(self, model: PreTrainedModel, *, first_position: int = 0) -> None:
        self._model = model
        self.first_position = first_position
        self._padding: int = getattr(model.config, "pad_token_id", None) or 0
        self._options = {"return_dict": True}
        if hasattr(model.config, "use_cache"):
            self._options["use_cache"] = False
        # transformers stores the rotary frequencies of the current pass in the model: only one pass may run at a time.
        longrope = _uses_longrope(model.config)
        self._lock: AbstractContextManager[object] = threading.Lock() if longrope else nullcontext()
        self.batching: Batching = "by length" if longrope else self._select_batching()

    @property
    def packed(self) -> bool:
        """Whether it runs packed batches, without padding."""
        return self.batching == "packed"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._model.device

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size."""
        return int(self._model.config.vocab_size)

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """See `transformer.Transformer`."""
        row = pack(rows, self.device, self.first_position)
        with self._lock:
            return self._hidden_states(rows, row), row.packing

    def _hidden_states(self, rows: Sequence[Sequence[int]], row: PackedRow) -> torch.Tensor:
        match self.batching:
            case "packed":
                return self.forward(row)
            case "padded":
                return self._padded(rows)
            case "by length":
                runs = [list(run) for _, run in itertools.groupby(rows, key=len)]
                return torch.cat([self._padded(run) for run in runs])

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Return the token vectors of a packed row, ``[tokens, d]``. Only if `packed` is true."""
        output = self._model(
            input_ids=row.ids[None],
            position_ids=row.positions[None],
            packing=row.packing,
            **self._options,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run a padded batch, and return the token vectors without those of the padding."""
        lengths = np.array([len(row) for row in rows])
        present = np.arange(lengths.max()) < lengths[:, None]
        padded = np.full(present.shape, self._padding)
        padded[present] = list(itertools.chain.from_iterable(rows))
        ids, mask = to_device(padded, self.device), to_device(present.astype(np.int64), self.device)
        output = self._model(input_ids=ids, attention_mask=mask, **self._options)
        hidden: torch.Tensor = output.last_hidden_state[mask.bool()]
        return hidden

    def _select_batching(self) -> Batching:
        """Return the cheapest batching that keeps the vectors, and set the attention function that it needs."""
        config = self._model.config
        # transformers' own attention functions disagree by one token on the width of bidirectional windows.
        bidirectional_window = getattr(config, "is_causal", True) is False and getattr(config, "sliding_window", None)
        packable = self._model._can_set_attn_implementation() and not bidirectional_window  # noqa: SLF001 - not public
        if packable and config.model_type in PROVEN:
            self._model.set_attn_implementation(NAME)
            return "packed"
        ids = [token for token in range(min(config.vocab_size, 64)) if token != self._padding] or [0]
        rows = [[ids[index * step % len(ids)] for index in range(1, step)] for step in (6, 11)]
        with torch.inference_mode():
            alone = torch.cat([self._padded([row]) for row in rows])
            if packable:
                original = config._attn_implementation  # noqa: SLF001 - there is a public setter, but no getter
                self._model.set_attn_implementation(NAME)
                try:
                    if _same(alone, self.forward(pack(rows, self.device, self.first_position))):
                        return "packed"
                except (PackingUnsupported, TypeError, RuntimeError) as error:
                    _logger.debug("packing failed: %s", error)
                self._model.set_attn_implementation(original)
            batching: Batching = "padded" if _same(alone, self._padded(rows)) else "by length"
        _logger.info("Batches of %s cannot be packed (batching: %s).", config.model_type, batching)
        return batching


def _uses_longrope(config: PreTrainedConfig) -> bool:
    """Return whether the model uses LongRoPE.

    Its rotary frequencies depend on the longest text of a pass, so that a text's vectors would depend on the batch.
    """
    parameter_sets = rope_parameter_sets(getattr(config, "rope_parameters", None))
    return any(parameters.get("rope_type") == "longrope" for parameters in parameter_sets)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether token vectors are equal up to rounding errors."""
    tolerance = 1e-5 if left.dtype == torch.float32 else 1e-3
    return bool(torch.nn.functional.cosine_similarity(left.float(), right.float()).min() > 1 - tolerance)


def load_backbone(checkpoint: Checkpoint, placement: Placement) -> Backbone:
    """Load the transformer of a checkpoint, without running any code that came with it.

    Raises:
        CheckpointInvalid: a file is missing or damaged, the architecture is unknown, or a tensor is missing, unexpected
            or of another shape than the config says.
    """
    folder = checkpoint.pipeline.backbone
    # Problems that transformers would log are raised as errors below. The functions have no annotations.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    description = dict(checkpoint.backbone_config)
    model_type = str(description.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CheckpointInvalid(
            f"{folder / 'config.json'}: the architecture {model_type!r} is not one that this version of transformers "
            f"({transformers.__version__}) has; code that comes with a checkpoint is never run"
        )
    for setting in [key for key in description if "_implementation" in key]:
        del description[setting]  # may name an attention function on the hub, which would be downloaded and run
    encoder_class = _ENCODER_HALVES.get(model_type)
    architecture = AutoModel if encoder_class is None else getattr(transformers, encoder_class)
    prefix = checkpoint.recipe.prefix if checkpoint.recipe else ""
    try:
        config = AutoConfig.for_model(model_type, **description)
    except Exception as error:  # each of the hundreds of config classes validates in its own way
        raise CheckpointInvalid(
            f"{folder / 'config.json'}: it is not a valid config of type {model_type!r}: {error}"
        ) from error
    names = tensor_names(folder)  # also refuses a pickle that holds anything but tensors
    model, report = architecture.from_pretrained(
        folder,
        config=config,
        dtype=placement.dtype,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the file's name
        key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
    )
    _check(checkpoint, report, model.base_model_prefix, names=names)
    model.pooler = torch.nn.Identity()  # its output is not used
    try:
        backbone = Backbone(model.eval().to(placement.device), first_position=checkpoint.first_position)
    except ValueError as error:
        if not config.is_encoder_decoder:
            raise
        raise CheckpointInvalid(
            f"{folder / 'config.json'}: encoder halves of {model_type!r} are not supported; supported are those of "
            f"{', '.join(_ENCODER_HALVES)}"
        ) from error
    if model_type in PROVEN:  # other types may access attributes of their linear layers
        _fuse_norms(model)
        prepack(model, quantized=placement.quantized)
    return backbone


def _check(checkpoint: Checkpoint, report: Mapping[str, Any], prefix: str, *, names: Collection[str]) -> None:
    """Refuse a checkpoint whose tensors are not those of its architecture.

    Args:
        checkpoint: the checkpoint.
        report: the loading info that transformers returned.
        prefix: prefix of the transformer's tensor names in a checkpoint that was saved with a head.
        names: names of all tensors in the checkpoint.

    Raises:
        CheckpointInvalid: see `check_tensors`.
    """
    model_type = checkpoint.backbone_config["model_type"]
    heads = set(names) - without_heads(names, (f"{prefix}.",))
    latent_attention = (LATENT_ATTENTION,) if checkpoint.recipe and checkpoint.recipe.latent_attention else ()
    decoder = ("decoder.",) if model_type in _ENCODER_HALVES else ()
    mask = _CAUSAL_MASKS.get(model_type, ())
    extra = [
        name
        for name in report["unexpected_keys"]
        if name not in heads and not name.startswith((*latent_attention, *decoder)) and not name.endswith(mask)
    ]
    check_tensors(
        checkpoint.pipeline.backbone,
        missing=report["missing_keys"],
        extra=[name.removeprefix(f"{prefix}.") for name in extra],
        misshapen=[name for name, *_shapes in report["mismatched_keys"]],
    )


class _RmsNorm(torch.nn.Module):
    """The RMS norm of the Llama family as one kernel; transformers uses seven, a sixth of a pass's time on a GPU."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self._weight = weight
        self._epsilon = epsilon

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the norm: ``[..., d]`` to ``[..., d]``."""
        return torch.nn.functional.rms_norm(rows, self._weight.shape, self._weight, self._epsilon)


def _fuse_norms(model: torch.nn.Module) -> None:
    """Replace each RMS norm within `model` by `_RmsNorm`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            epsilon = getattr(child, "variance_epsilon", None)  # its name in all types of `PROVEN`
            if type(child).__name__.endswith("RMSNorm") and isinstance(epsilon, float):
                setattr(parent, name, _RmsNorm(child.get_parameter("weight").detach(), epsilon))
