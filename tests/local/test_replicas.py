"""One model on several devices: the vectors are those of a single device, and the devices share the work."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
import pytest

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.errors import ModelUnavailable
from embeddings_mcp.schema import EmbeddingRequest
from embeddings_mcp.settings import Settings
from embeddings_mcp.vectors import FloatMatrix
from tests.local.golden import GOLDEN

pytestmark = pytest.mark.anyio

SECONDS = 60
TEXTS = [f"passage number {number} " * (number % 40 + 1) for number in range(200)]


async def vectors(texts: Sequence[str], **settings: Any) -> FloatMatrix:
    """Embed texts with a service with these settings."""
    service = build_service(Settings(models=(f"mine={GOLDEN / 'e5' / 'model'}",), cache="off", **settings))
    with anyio.fail_after(SECONDS):
        response = await service.create_embedding(EmbeddingRequest(model="mine", input=list(texts), truncate="END"))
        await service.aclose()
    return np.array([entry["embedding"] for entry in response["data"]])


async def test_several_devices_share_the_batches_and_make_the_vectors_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names the CPU twice; each worker thread waits once for the other, so that neither takes all of the work."""
    alone = await vectors(TEXTS)

    used: Counter[int] = Counter()
    barrier = threading.Barrier(2)
    forward = Encoder.forward

    def counting(self: Encoder, rows: Sequence[Sequence[int]], skip: int) -> FloatMatrix:
        if threading.current_thread().name.startswith("encode"):
            used[id(self)] += 1
            if used[id(self)] == 1:
                barrier.wait(SECONDS)
        return forward(self, rows, skip)

    monkeypatch.setattr(Encoder, "forward", counting)
    shared = await vectors(TEXTS, device="cpu, cpu", workers=2)
    np.testing.assert_allclose(shared, alone, atol=1e-6)
    assert len(used) == 2


async def test_a_missing_device_is_named_wherever_it_is_in_the_list() -> None:
    with pytest.raises(ModelUnavailable, match="the device 'cuda:7' cannot be used here"):
        await vectors(["a"], device="cpu,cuda:7", precision="float32")
