"""A checkpoint's tokenizer, as its files say it: straight from ``tokenizer.json``.

That file is read by the tokenizers library itself: it is what the model was trained with, while transformers' classes
rebuild parts of it for some families and then give other ids. Two things they rebuilt in training too, up to version 4:
how BERT's text is normalized, and which special tokens stand around Llama's. The latter gte-Qwen2's own code does too.
Where there is no such file, transformers makes the tokenizer from older ones.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object
from embeddings_mcp.embedders.local.python_tokenizer import PythonTokenizer
from embeddings_mcp.embedders.local.tokenizer import Tokenizer
from embeddings_mcp.errors import CheckpointInvalid, MissingDependency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BERT = frozenset(
    {"BertTokenizer", "ConvBertTokenizer", "DPRContextEncoderTokenizer", "DPRQuestionEncoderTokenizer"}
    | {"DistilBertTokenizer", "ElectraTokenizer", "LayoutLMTokenizer", "MPNetTokenizer", "MobileBertTokenizer"}
    | {"SqueezeBertTokenizer"}
)
"""Classes of transformers for which ``tokenizer_config.json`` goes before ``tokenizer.json`` in how to normalize."""

_BERT_TYPES = frozenset(
    {"bert", "convbert", "distilbert", "dpr", "electra", "ernie", "layoutlm", "megatron-bert", "mobilebert", "mpnet"}
    | {"nezha", "nomic_bert", "qdqbert", "retribert", "squeezebert", "visual_bert"}
)
"""Model types that have one of these classes where none is named."""

_GTE = "tokenization_qwen.Qwen2TokenizerFast"
"""What gte-Qwen2, and models that were made from it, call the tokenizer of their own code."""

_LLAMA = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
_ENDS: dict[str, dict[str, Any]] = {
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": {"add_bos_token": True, "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
    "GPTNeoXTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "GemmaTokenizer": {"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"},
    "LlamaTokenizer": _LLAMA,
    _GTE: {"eos_token": "<|endoftext|>"},
}
"""Classes, all but the last of transformers 4, for which ``tokenizer_config.json`` goes before ``tokenizer.json`` in
what stands around a text, and what they take for said in it that is not."""


def read_tokenizer(
    folder: Path, *, max_tokens: int, lowercase: bool = False, suffix: str = "", special_tokens: bool = True
) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: where it is.
        max_tokens: see `Tokenizer`.
        lowercase: whether texts are put in lower case first.
        suffix: see `Tokenizer`.
        special_tokens: whether any are put around a text.

    Raises:
        CheckpointInvalid: there is none, or it cannot be read.
        MissingDependency: it needs a package that is not installed.
    """
    path = folder / "tokenizer.json"
    try:
        read = FastTokenizer.from_file(str(path)) if path.is_file() else _convert(folder)
        tokenizer = (
            _as_said(read, folder, lowercase=lowercase, special_tokens=special_tokens)
            if isinstance(read, FastTokenizer)
            else PythonTokenizer(read, lowercase=lowercase, special_tokens=special_tokens)
        )
        return Tokenizer(tokenizer, max_tokens=max_tokens, suffix=suffix)
    except BaseException as error:  # readers raise whatever comes, and a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = MissingDependency if isinstance(error, ImportError) else CheckpointInvalid
        raise kind(f"{path}: the tokenizer cannot be read: {error}") from error


def _as_said(tokenizer: FastTokenizer, folder: Path, *, lowercase: bool, special_tokens: bool) -> FastTokenizer:
    """The same, with what the files beside it say, and without truncation and padding.

    Files may carry the settings of some training run: MiniLM's cuts at 128 and pads to 128.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_object(folder / "tokenizer_config.json", optional=True)
    model = read_object(folder / "config.json", optional=True)
    kind = (config.get("tokenizer_class", "") or model.get("tokenizer_class", "")).removesuffix("Fast")
    is_bert = kind in _BERT if kind else model.get("model_type", "") in _BERT_TYPES
    if is_bert:
        _normalize_as_said(tokenizer, config)
    _add_tokens_as_said(tokenizer, config, read_object(folder / "added_tokens.json", optional=True))
    if _GTE in str(config.fields.get("auto_map")):
        kind = _GTE
    if kind in _ENDS and config.fields.keys() & {"add_bos_token", "add_eos_token"}:
        _put_around_as_said(tokenizer, JsonObject(config.path, _ENDS[kind] | config.fields))
    if not special_tokens:
        tokenizer.post_processor = None
    if lowercase:
        own = tokenizer.normalizer
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([own] if own else [])])
    return tokenizer


def _normalize_as_said(tokenizer: FastTokenizer, config: JsonObject) -> None:
    """See to it that BERT's texts are normalized as its config says, or where that is silent, as transformers does."""
    own = tokenizer.normalizer
    if isinstance(own, normalizers.BertNormalizer):
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=own.clean_text,
            handle_chinese_chars=config.get("tokenize_chinese_chars", default=True),
            strip_accents=config.fields.get("strip_accents"),
            lowercase=config.get("do_lower_case", default=True),
        )


def _put_around_as_said(tokenizer: FastTokenizer, config: JsonObject) -> None:
    """Put those special tokens around a text that the config asks for.

    transformers 5 neither reads this nor writes it: where it is said, version 4 did so when the model was trained.
    """
    first, last = (_end(tokenizer, config, name) for name in ("bos", "eos"))
    single = [*(token for token, _ in first), "$A", *(token for token, _ in last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*first, *last])


def _end(tokenizer: FastTokenizer, config: JsonObject, name: str) -> list[tuple[str, int]]:
    """The token that is to stand at one end of a text, and its id; none where there is to be none."""
    if not config.get(f"add_{name}_token", default=False):
        return []
    token: Any = config.fields.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        raise config.wrong(f"{name}_token", "a token of the tokenizer")
    return [(token, number)]


def _add_tokens_as_said(tokenizer: FastTokenizer, config: JsonObject, legacy: JsonObject) -> None:
    """Add the tokens that are named beside ``tokenizer.json`` and not in it.

    Args:
        tokenizer: what it says.
        config: ``tokenizer_config.json``.
        legacy: ``added_tokens.json``, which was there before the config had a place for them.
    """
    if described := config.get("added_tokens_decoder", {}):
        said = [AddedToken(**described[number]) for number in sorted(described, key=int)]
    else:
        said = [AddedToken(token, normalized=True) for token in sorted(legacy.fields, key=legacy.fields.__getitem__)]
    special = config.get("additional_special_tokens", [])
    said += [AddedToken(token, special=True) for token in special if isinstance(token, str)]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in said if token.content not in known])


def _convert(folder: Path) -> FastTokenizer | PreTrainedTokenizerBase:
    """A tokenizer from the files that there were before ``tokenizer.json``; of transformers, if it is one in Python.

    Raises:
        FileNotFoundError: they are not here; transformers would make an empty tokenizer then, which knows no word.
        ImportError: it needs a package that is not installed.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # where a format's packages are missing, it tries the next, and says what is wrong with that
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
    """See that there is what reads SentencePiece's files, of which this is one.

    Raises:
        ImportError: there is not; says what to install.
    """
    try:
        for package in ("sentencepiece", "google.protobuf"):
            import_module(package)
    except ImportError as error:
        raise ImportError(
            f"it is missing, and {path.name} needs packages: pip install sentencepiece protobuf"
        ) from error
