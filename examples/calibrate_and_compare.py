"""Calibrate the bundled CIFAR-10 model by two methods on the same states, and compare their images with the float ones.

python examples/calibrate_and_compare.py        # from a clone; some minutes on two CPU cores
"""

import torch

import qdiff


def decibels(images: torch.Tensor, reference: torch.Tensor) -> float:
    """PSNR of the mean squared error."""
    return -10 * (images - reference).square().mean().log10().item()


def main(
    config: str = "configs/cifar10-small.yml", samples: int = 16, steps: int = 20, images: int = 16, **options
) -> dict[str, float]:
    """samples: seeds that calibrate. options: fields of `qdiff.MethodOptions`. Returns PSNR by method."""
    model = qdiff.load_model(config)
    sampling = {"steps": steps, "skip_type": "quad", "seed": 1234}
    data = model.record(samples, **sampling)
    reference = model.sample(images, **sampling)
    found = {}
    for method in ("nearest", "quick"):
        shared = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split": True}
        states = {"selector_steps": min(steps, 10), "per_step": samples}
        quantized = qdiff.quantize(model, method=method, data=data, **shared, **states, **options)
        found[method] = decibels(quantized.sample(images, **sampling), reference)
        print(f"{method}: {found[method]:.2f} dB")
    return found


if __name__ == "__main__":
    main()
