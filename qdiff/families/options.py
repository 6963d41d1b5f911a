"""What a user says about a model and its samples, whatever the family."""

from __future__ import annotations

from dataclasses import dataclass

Entry = str | int  # what an image is asked for: a prompt or a label


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled. None takes the model's own default.

    steps: of the sampler. sampler: a name of the family's `samplers`, by default the first. skip_type: spacing of a
    pixel model's timesteps, "uniform" or "quad". eta: share of DDPM noise, 0 (DDIM) to 1. scale: of guidance, 1 for
    none. seed: every image's noise follows from it and the image's index. height, width: of the images in pixels.
    prompts: of a text-to-image model, labels: of a class-conditional one; images take them in turn. no_label: the label
    that stands for no class, -1 for none.
    """

    steps: int = 50
    sampler: str | None = None
    skip_type: str = "uniform"
    eta: float = 0.0
    scale: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    no_label: int | None = None
