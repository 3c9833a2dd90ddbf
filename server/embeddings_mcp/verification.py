"""Check whether two embedders produce the same vectors, for instance before moving off an endpoint that is shut down.

Two embedders share a vector space if their vectors are equal up to rounding. Each sample text is embedded by both, as a
query and as a passage, and the cosine similarities of the pairs decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.errors import InputTooLong, InvalidRequest
from embeddings_mcp.models import InputType, Truncate
from embeddings_mcp.vectors import FloatMatrix, normalize

SAME = 0.999
"""Cosine at and above which two vectors of a text are equal up to rounding: bfloat16 gives about 0.9999."""

NEAR = 0.98
"""Cosine at and above which they may be from one model with quantized weights (int8, fp8) or different prompts."""

_PARAGRAPH = (
    "The committee met on the first Tuesday of the month to go through the budget for the coming year. Repairs to the "
    "bridge, which had been put off twice, were moved to the top of the list, and the money for them came from the "
    "reserve. Two members asked for a second opinion on the costs; the others thought that enough time had been lost. "
)

SAMPLES: dict[str, str] = {
    "word": "Photosynthesis",
    "question": "How do I reset the password of my online account?",
    "sentence": "The quick brown fox jumps over the lazy dog.",
    "paragraph": _PARAGRAPH,
    "page": _PARAGRAPH * 6,
    "German": "Wie spät ist es, und wann fährt der nächste Zug nach Köln?",
    "French": "Où se trouve la bibliothèque municipale la plus proche ?",
    "Spanish": "¿Cuánto cuesta un billete de ida y vuelta a Sevilla?",
    "Russian": "Сколько планет в Солнечной системе?",
    "Arabic": "ما هي عاصمة المغرب؟",
    "Hindi": "भारत की सबसे लंबी नदी कौन सी है?",
    "Chinese": "自然语言处理是人工智能的一个分支。",
    "Japanese": "東京から京都まで新幹線でどのくらいかかりますか。",
    "Korean": "오늘 서울의 날씨는 어떻습니까?",
    "code": "def add(a: int, b: int) -> int:\n    return a + b",
    "numbers": "Invoice 2024-0815: 3 x 19.99 EUR, 7 % VAT, total 64.17 EUR",
    "prompt": "query: is this text a query, or does it only look like one?",
    "spaces": "  two  spaces,\ta tab\n\nand  an  empty  line  ",
    "emoji": "Great job! 👩‍🚀🎉",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One sample, embedded by both.

    Attributes:
        sample: name of the sample.
        input_type: what it was embedded as; None if neither model distinguishes queries from passages.
        cosine: cosine similarity of the two vectors, -1 to 1.
    """

    sample: str
    input_type: InputType | None
    cosine: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of all comparisons.

    Attributes:
        same: whether both have the same vector space.
        summary: the result as one sentence, with the likely cause of a difference.
        comparisons: the comparisons in the order of the samples, without samples that are too long for an embedder that
            cannot truncate.
    """

    same: bool
    summary: str
    comparisons: tuple[Comparison, ...]


async def verify(one: Embedder, other: Embedder) -> Verdict:
    """Embed the samples with both embedders, and compare the vectors.

    Raises:
        EmbeddingsError: one of them cannot embed.
    """
    await one.check()
    await other.check()
    uses_input_type = {one.card.input_type, other.card.input_type} != {"ignored"}
    truncate: Truncate = "END" if await _can_truncate(one) and await _can_truncate(other) else "NONE"
    comparisons: list[Comparison] = []
    for input_type in get_args(InputType) if uses_input_type else (None,):
        samples = dict(SAMPLES)
        while True:
            try:
                left = await _vectors(one, samples, input_type, truncate)
                right = await _vectors(other, samples, input_type, truncate)
                break
            except InputTooLong as error:  # an embedder that cannot truncate: skip the sample
                if len(samples) == 1:
                    raise
                del samples[[*samples][error.index]]
        if left.shape[1] != right.shape[1]:
            summary = f"not the same vector space: vectors of {left.shape[1]} and of {right.shape[1]} dimensions"
            return Verdict(same=False, summary=summary, comparisons=())
        cosines = (normalize(left) * normalize(right)).sum(axis=1)
        comparisons += [
            Comparison(sample, input_type, float(cosine)) for sample, cosine in zip(samples, cosines, strict=True)
        ]
    return _judge(comparisons)


async def _vectors(
    embedder: Embedder, samples: Mapping[str, str], input_type: InputType | None, truncate: Truncate
) -> FloatMatrix:
    return (await embedder.embed([*samples.values()], input_type=input_type, truncate=truncate)).vectors


async def _can_truncate(embedder: Embedder) -> bool:
    """Whether an embedder supports truncation; many endpoints do not."""
    try:
        await embedder.embed([SAMPLES["word"]], input_type="passage", truncate="END")
    except InvalidRequest as error:
        if error.param != "truncate":
            raise
        return False
    return True


def _judge(comparisons: Sequence[Comparison]) -> Verdict:
    lowest = min(comparison.cosine for comparison in comparisons)
    different = [comparison for comparison in comparisons if not comparison.cosine >= SAME]
    if not different:
        exactness = "equal" if lowest > 0.99999 else "equal up to rounding, as of bfloat16"
        summary = f"the same vector space: vectors are {exactness} (lowest cosine {lowest:.6f})"
    else:
        summary = (
            f"not the same vector space: {len(different)} of {len(comparisons)} vectors differ (lowest {lowest:.4f})"
        )
        input_types = {comparison.input_type for comparison in different}
        if input_types != {comparison.input_type for comparison in comparisons}:
            summary += f", all of them embedded as {input_types.pop()}: the prompts may differ"
        elif lowest >= NEAR:
            summary += ": the weights may be quantized, or the prompts differ"
        elif len(different) < len(comparisons):
            summary += f": {', '.join(dict.fromkeys(comparison.sample for comparison in different))}"
    return Verdict(same=not different, summary=summary, comparisons=tuple(comparisons))
