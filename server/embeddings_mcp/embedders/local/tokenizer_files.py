"""Read a checkpoint's tokenizer, directly from ``tokenizer.json`` where possible.

The tokenizers library reads that file itself: it is what the model was trained with, while transformers' classes
rebuild parts of it for some families and then give other ids. Up to version 4, transformers rebuilt three things in
training as well, and so they are rebuilt here: BERT's normalization, the space before a text for byte-level BPE, and
the special tokens around a text for Llama. gte-Qwen2's own code does the latter too. Without ``tokenizer.json``,
transformers converts the tokenizer from older files.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object
from embeddings_mcp.embedders.local.python_tokenizer import PythonTokenizer
from embeddings_mcp.embedders.local.tokenizer import Tokenizer
from embeddings_mcp.errors import CheckpointInvalid, MissingDependency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BERT_CLASSES = frozenset(
    {"BertTokenizer", "ConvBertTokenizer", "DPRContextEncoderTokenizer", "DPRQuestionEncoderTokenizer"}
    | {"DistilBertTokenizer", "ElectraTokenizer", "LayoutLMTokenizer", "MPNetTokenizer", "MobileBertTokenizer"}
    | {"SqueezeBertTokenizer"}
)
"""Tokenizer classes whose normalization is set by ``tokenizer_config.json``, which overrides ``tokenizer.json``."""

_BERT_TYPES = frozenset(
    {"bert", "convbert", "distilbert", "dpr", "electra", "ernie", "layoutlm", "megatron-bert", "mobilebert", "mpnet"}
    | {"nezha", "nomic_bert", "qdqbert", "retribert", "squeezebert", "visual_bert"}
)
"""Model types that use one of these classes if no class is named."""

_GENERIC_CLASSES = frozenset({"PreTrainedTokenizer", "TokenizersBackend"})
"""Names of the tokenizer class that takes ``add_prefix_space`` from ``tokenizer.json``. The classes of byte-level BPE,
such as RoBERTa's, take it from ``tokenizer_config.json``."""

_GTE = "tokenization_qwen.Qwen2TokenizerFast"
"""The tokenizer class in the own code of gte-Qwen2 and of models derived from it."""

_LLAMA = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
_BOS_EOS_DEFAULTS: dict[str, dict[str, Any]] = {
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": {"add_bos_token": True, "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
    "GPTNeoXTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "GemmaTokenizer": {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"},
    "LlamaTokenizer": _LLAMA,
    _GTE: {"eos_token": "<|endoftext|>"},
}
"""Tokenizer classes whose special tokens around a text are set by ``tokenizer_config.json``, which overrides
``tokenizer.json``; with their defaults for absent fields. All but the last are classes of transformers 4."""


def read_tokenizer(
    folder: Path, *, max_tokens: int, lowercase: bool = False, suffix: str = "", static: bool = False
) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: folder of the tokenizer's files.
        max_tokens: see `Tokenizer`.
        lowercase: whether to lowercase texts before tokenization.
        suffix: see `Tokenizer`.
        static: whether it is that of static embeddings: ``tokenizer.json`` alone, without special tokens around a text.

    Raises:
        CheckpointInvalid: the tokenizer is missing, or cannot be read.
        MissingDependency: the tokenizer needs a package that is not installed.
    """
    path = folder / "tokenizer.json"
    try:
        loaded = FastTokenizer.from_file(str(path)) if static or path.is_file() else _convert(folder)
        tokenizer = (
            _configure(loaded, folder, lowercase=lowercase, static=static)
            if isinstance(loaded, FastTokenizer)
            else PythonTokenizer(loaded, lowercase=lowercase)
        )
        return Tokenizer(tokenizer, max_tokens=max_tokens, suffix=suffix)
    except BaseException as error:  # both libraries raise any class; a Rust panic in tokenizers is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = MissingDependency if isinstance(error, ImportError) else CheckpointInvalid
        raise kind(f"{path}: the tokenizer cannot be read: {error}") from error


def _configure(tokenizer: FastTokenizer, folder: Path, *, lowercase: bool, static: bool) -> FastTokenizer:
    """Apply the settings of the checkpoint's other files, and disable truncation and padding.

    ``tokenizer.json`` may contain settings of a training run: MiniLM's truncates and pads to 128 tokens.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if static:  # sentence-transformers reads no other file, and adds no special tokens
        tokenizer.post_processor = None
        return tokenizer
    config = read_object(folder / "tokenizer_config.json", optional=True)
    model = read_object(folder / "config.json", optional=True)
    class_name = (config.get("tokenizer_class", "") or model.get("tokenizer_class", "")).removesuffix("Fast")
    is_bert = class_name in _BERT_CLASSES if class_name else model.get("model_type", "") in _BERT_TYPES
    if is_bert:
        _set_bert_normalizer(tokenizer, config)
    if class_name not in _GENERIC_CLASSES:
        _set_prefix_space(tokenizer, config)
    _add_tokens(tokenizer, config, read_object(folder / "added_tokens.json", optional=True))
    if _GTE in str(config.fields.get("auto_map")):
        class_name = _GTE
    if class_name in _BOS_EOS_DEFAULTS and config.fields.keys() & {"add_bos_token", "add_eos_token"}:
        _set_bos_eos(tokenizer, JsonObject(config.path, _BOS_EOS_DEFAULTS[class_name] | config.fields))
    tokenizer.encode_special_tokens = config.get("split_special_tokens", default=False)
    if lowercase:
        normalizer = tokenizer.normalizer
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([normalizer] if normalizer else [])])
    return tokenizer


def _set_bert_normalizer(tokenizer: FastTokenizer, config: JsonObject) -> None:
    """Set BERT's normalization from the config, with transformers' defaults for absent fields."""
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=normalizer.clean_text,
            handle_chinese_chars=config.get("tokenize_chinese_chars", default=True),
            strip_accents=config.fields.get("strip_accents"),
            lowercase=config.get("do_lower_case", default=True),
        )


def _set_prefix_space(tokenizer: FastTokenizer, config: JsonObject) -> None:
    """Set whether byte-level BPE adds a space before a text from the config, if it says."""
    pre_tokenizer = tokenizer.pre_tokenizer
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
        pre_tokenizer.add_prefix_space = config.get("add_prefix_space", pre_tokenizer.add_prefix_space)


def _set_bos_eos(tokenizer: FastTokenizer, config: JsonObject) -> None:
    """Add the special tokens around a text that the config asks for.

    transformers 5 neither reads nor writes these fields; if they are present, version 4 applied them in training.
    """
    bos, eos = (_special_token(tokenizer, config, name) for name in ("bos", "eos"))
    single = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*bos, *eos])


def _special_token(tokenizer: FastTokenizer, config: JsonObject, name: str) -> list[tuple[str, int]]:
    """Return the ``bos`` or ``eos`` token and its id; an empty list if the config does not ask for it."""
    if not config.get(f"add_{name}_token", default=False):
        return []
    token: Any = config.fields.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise config.invalid(f"{name}_token", "a token of the tokenizer")
    return [(token, token_id)]


def _add_tokens(tokenizer: FastTokenizer, config: JsonObject, legacy: JsonObject) -> None:
    """Add the tokens that are listed in other files than ``tokenizer.json``.

    Args:
        tokenizer: the tokenizer as read from ``tokenizer.json``.
        config: ``tokenizer_config.json``.
        legacy: ``added_tokens.json``, which preceded the config's ``added_tokens_decoder``.
    """
    if described := config.get("added_tokens_decoder", {}):
        added = [AddedToken(**described[token_id]) for token_id in sorted(described, key=int)]
    else:
        added = [AddedToken(token, normalized=True) for token in sorted(legacy.fields, key=legacy.fields.__getitem__)]
    special = config.get("additional_special_tokens", [])
    added += [AddedToken(token, special=True) for token in special if isinstance(token, str)]
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in added if token.content not in present])


def _convert(folder: Path) -> FastTokenizer | PreTrainedTokenizerBase:
    """Convert a tokenizer from formats older than ``tokenizer.json``; return Python tokenizers as they are.

    Raises:
        FileNotFoundError: the files are missing. transformers would then make an empty tokenizer, without vocabulary.
        ImportError: the conversion needs a package that is not installed.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # if a format's packages are missing, transformers tries the next format and reports that failure
        for path in folder.glob("*.model"):
            _check_sentencepiece(path)
        raise
    backend: FastTokenizer | None = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        return converted
    files = {key: name for key, name in converted.vocab_files_names.items() if key != "tokenizer_file"}
    missing = [name for name in files.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"it is missing, and so is {', '.join(missing)}")
    return backend


def _check_sentencepiece(path: Path) -> None:
    """Check that the packages for reading a SentencePiece file are installed.

    Raises:
        ImportError: a package is missing; says what to install.
    """
    try:
        for package in ("sentencepiece", "google.protobuf"):
            import_module(package)
    except ImportError as error:
        raise ImportError(
            f"it is missing, and {path.name} needs packages: pip install sentencepiece protobuf"
        ) from error
