"""What a user says about a calibration, whatever the method: one value per flag."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodOptions:
    """The flags that methods turn into recipes; names and defaults are those of the command line.

    act_bits None leaves activations float. None elsewhere means the method's own default.
    """

    weight_bits: int = 8
    act_bits: int | None = None
    act_symmetric: bool = False
    softmax_bits: int = 8
    split: bool = False
    selector_steps: int | None = None  # sampler steps whose states calibrate
    per_step: int | None = None  # states of each of them
    batch_size: int | None = None  # of the learned stages
    iterations: int | None = None  # learning of weights
    act_iterations: int | None = None  # learning of activation scales
    act_rate: float | None = None  # learning rate of activation scales
    loss_p: float | None = None  # norm of the loss while activation scales learn
    running_stat: bool = False
    softmax_running_stat: bool = False
    weight_range: str | None = None  # range finder of weights
    act_range: str | None = None  # range finder of activations
    rounding_start: str = "nearest"
    compat: tuple[str, ...] = ()
    family: str = "pixel"  # whose published settings a method takes: "pixel", "latent", or "text" (Stable Diffusion)
