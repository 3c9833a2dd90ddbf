"""Texts to token ids, with the prompt before them and cut to the model's length, straight from ``tokenizer.json``.

The file is read by the tokenizers library itself: it is what the model was trained with, while transformers' classes
rebuild parts of it for some families and then give other ids. Two things they rebuilt in training too, up to version 4:
how BERT's text is normalized, and which special tokens stand around Llama's. The latter gte-Qwen2's own code does too.
Where there is no such file, transformers makes the tokenizer from older ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from embeddings_mcp.embedders.local.jsonfile import JsonObject, read_object
from embeddings_mcp.embedders.local.python_tokenizer import PythonTokenizer
from embeddings_mcp.errors import CheckpointInvalid, InputTooLong, InputUnusable, InvalidRequest, MissingDependency
from embeddings_mcp.models import Truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 16
"""Of a text with more characters than this for each token that the model takes, only one end is tokenized at first.
English has about 4; text that has more still comes out right, at the cost of a second look."""

_MARGIN = 64
"""Tokens at the edge of such an excerpt that are not believed, since the cut may have parted what belongs together."""

_COUNTED = 1 << 20
"""A text of up to so many characters is counted to its end before it is refused, and cut as if all of it had been
tokenized. In a longer one without any boundary, a run of one letter, an excerpt may begin with half a token. Tokenizers
in Python, which take the square of a word's length, are not asked for more than the excerpt."""

_SHORT = 2048
"""Characters up to which a single text is tokenized without letting go of the interpreter lock: that takes less than to
get it back from threads that compute."""


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


class Tokenizer:
    """A model's tokenizer.

    Args:
        tokenizer: makes tokens of a text; never cuts, and never pads.
        max_tokens: longest text, special tokens and prompt included.
        suffix: what is put behind every text; truncation at the end drops it like the text.
    """

    def __init__(self, tokenizer: FastTokenizer | PythonTokenizer, *, max_tokens: int, suffix: str = "") -> None:
        self._tokenizer = tokenizer
        self._counted = 0 if isinstance(tokenizer, PythonTokenizer) else _COUNTED
        self._suffix = suffix
        self.max_tokens = max_tokens
        added = tokenizer.encode("a").special_tokens_mask
        self._before, self._after = added.index(0), added[::-1].index(0)

    @classmethod
    def from_folder(
        cls, folder: Path, *, max_tokens: int, lowercase: bool = False, suffix: str = "", special_tokens: bool = True
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
            return cls(tokenizer, max_tokens=max_tokens, suffix=suffix)
        except BaseException as error:  # readers raise whatever comes, and a panic of tokenizers is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            kind = MissingDependency if isinstance(error, ImportError) else CheckpointInvalid
            raise kind(f"{path}: the tokenizer cannot be read: {error}") from error

    def encode(self, texts: Sequence[str], *, prompt: str, truncate: Truncate) -> list[list[int]]:
        """The token ids of each text, prompt and special tokens included, never more than the model takes.

        `truncate` END drops the end of a text, START its beginning; prompt and special tokens stay. A text much longer
        than the model takes costs about as much as the part that is kept.

        Raises:
            InputTooLong: texts are too long and `truncate` is NONE.
            InputUnusable: the tokenizer leaves nothing of a text.
            InvalidRequest: the model's limit behind the prompt leaves nothing of any text.
        """
        if self._suffix:
            texts = [text + self._suffix for text in texts]
        reach = _CHARACTERS_PER_TOKEN * self.max_tokens
        if truncate == "NONE":
            reach = max(reach, self._counted)
        rows: list[list[int]] = []
        too_long: dict[int, int | None] = {}
        for index, (text, first) in enumerate(zip(texts, self._look(texts, reach, prompt, truncate), strict=True)):
            ids, seen = first, reach
            while seen < len(text) and not self._settled(ids, text, seen, prompt, truncate):
                seen *= 8
                (ids,) = self._look([text], seen, prompt, truncate)
            if len(ids) > self.max_tokens:
                if truncate == "NONE":
                    too_long[index] = len(ids) if seen >= len(text) else None
                    continue
                ids = self._cut(ids, prompt, truncate)
            if not ids:
                raise InputUnusable("holds nothing that the model's tokenizer keeps", index=index)
            rows.append(ids)
        if too_long:
            index, *others = too_long
            raise InputTooLong(index=index, tokens=too_long[index], allowed=self.max_tokens, others=others)
        return rows

    def _look(self, texts: Sequence[str], reach: int, prompt: str, truncate: Truncate) -> list[list[int]]:
        """The ids of the prompt and of that end of each text that is to be kept, `reach` characters of it at most."""
        excerpts = [prompt + (text[-reach:] if truncate == "START" else text[:reach]) for text in texts]
        if len(excerpts) == 1 and len(excerpts[0]) <= _SHORT:
            return [self._tokenizer.encode(excerpts[0]).ids]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(excerpts)]

    def _settled(self, ids: list[int], text: str, reach: int, prompt: str, truncate: Truncate) -> bool:
        """Whether the tokens to be kept are those that the whole text has, and not an accident of where it was cut.

        They are believed when a cut elsewhere leaves the same; a text of one repeated letter is where it does not.
        """
        if len(ids) < self.max_tokens + _MARGIN:
            return False
        if truncate == "NONE" or reach >= self._counted:
            return True
        (others,) = self._look([text], reach - 1, prompt, truncate)
        kept = slice(-self.max_tokens, None) if truncate == "START" else slice(self.max_tokens)
        return ids[kept] == others[kept]

    def ids_of(self, *tokens: str) -> set[int]:
        """The ids of these tokens, of those that there are."""
        return {number for token in tokens if (number := self._tokenizer.token_to_id(token)) is not None}

    def prompt_length(self, prompt: str) -> int:
        """How many tokens at the start of a text are the prompt's or special.

        The last of the prompt may join the first of the text and is then not counted.
        """
        if not prompt:
            return 0
        return len(self._tokenizer.encode(prompt).ids) - self._after

    def _cut(self, ids: list[int], prompt: str, truncate: Truncate) -> list[int]:
        """Drop as many tokens as are too many, from the text's end or from its start."""
        end = len(ids) - self._after
        first, last = ids[: self._before + self._shared(ids, prompt)], ids[end:]
        kept = self.max_tokens - len(first) - len(last)
        if kept < 1:
            raise InvalidRequest(
                f"the limit of {self.max_tokens} tokens leaves no room for text behind the prompt and special tokens, "
                f"which are {len(first) + len(last)}"
            )
        text = ids[len(first) : end]
        return first + (text[:kept] if truncate == "END" else text[-kept:]) + last

    def _shared(self, ids: list[int], prompt: str) -> int:
        """How many tokens behind the special ones are the prompt's and nothing else's."""
        alone = self._tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        pairs = zip(alone, ids[self._before :], strict=False)
        return next((count for count, (ours, theirs) in enumerate(pairs) if ours != theirs), len(alone))


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
