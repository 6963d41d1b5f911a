"""Load a calibrated `ckpt.pth` of the Q-Diffusion repository, and export it for ONNX Runtime.

    python examples/original_to_onnx.py CONFIG_OR_CHECKPOINT CKPT_PTH OUT_ONNX [WEIGHT_BITS] [ACT_BITS]

The file does not say how it was quantized: bits are given here, symmetric activations and split shortcuts as published.
"""

import sys
from pathlib import Path

import qdiff


def main(model: str, checkpoint: str, out: str, weight_bits: int = 4, act_bits: int = 8) -> qdiff.QuantizedModel:
    """Write `out`. Returns the quantized model, run by ONNX Runtime."""
    float_model = qdiff.load_model(model)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits, "act_symmetric": True, "split": True}
    quantized = qdiff.load_original(checkpoint, float_model, **bits)
    quantized.export_onnx(out)
    print(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB")
    return quantized.prepare("onnx")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
