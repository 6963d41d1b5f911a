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
    selector_steps: int | None = None  # --cali_st
    per_step: int | None = None  # --cali_n
    batch_size: int | None = None  # --cali_batch_size
    iterations: int | None = None  # --cali_iters: learning of weights
    act_iterations: int | None = None  # --cali_iters_a: learning of activation scales
    act_rate: float | None = None  # --cali_lr
    loss_p: float | None = None  # --cali_p
    running_stat: bool = False
    softmax_running_stat: bool = False  # --rs_sm_only
    weight_range: str | None = None  # range finder of weights
    act_range: str | None = None  # range finder of activations
    rounding_start: str = "nearest"
    compat: tuple[str, ...] = ()
    family: str = "pixel"  # whose published settings a method takes: "pixel", "latent", or "text" (Stable Diffusion)
