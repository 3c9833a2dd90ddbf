"""Export the model to ONNX: ``python -m benchmarks.export_onnx FOLDER`` in the peers' environment.

Writes ``minilm-onnx/`` into that environment: one model in float32, and one with weights and activations in int8. The
other files of the model's folder are copied next to them, for optimum. These options gave onnxruntime its best figures:
its own fusions at load time are faster than those of its ``transformers.optimizer``, and per-channel scales of the
weights cost no time, while without them the mean cosine to float32 is only 0.94.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModel

_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
_OUTPUT = "last_hidden_state"


def main(source: str) -> None:
    """Export the model in a folder."""
    folder = Path(sys.prefix) / "minilm-onnx"
    folder.mkdir(exist_ok=True)
    for file in Path(source).iterdir():
        if file.suffix in {".json", ".txt"}:
            shutil.copy(file, folder)
    exported = folder / "model.onnx"
    torch.onnx.export(
        AutoModel.from_pretrained(source, attn_implementation="eager").eval(),
        (),
        str(exported),
        kwargs={name: torch.ones(2, 8, dtype=torch.int64) for name in _INPUTS},
        input_names=_INPUTS,
        output_names=[_OUTPUT],
        dynamic_axes={name: {0: "texts", 1: "tokens"} for name in [*_INPUTS, _OUTPUT]},
        opset_version=17,
        dynamo=False,
    )
    quantize_dynamic(
        exported,
        folder / "model_quantized.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
