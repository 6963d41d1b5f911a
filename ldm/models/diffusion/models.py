"""Noise-predicting diffusion models, in pixels and in latents: what they compute, and their loss.

DDPM: arXiv 2006.11239 §3.4; latent diffusion: arXiv 2112.10752 §3.2 and 3.3. A checkpoint of these modules has the
published keys `model.diffusion_model.*`, `model_ema.*`, `first_stage_model.*`, `cond_stage_model.*`, `scale_factor`.
`ldm.models.diffusion.ddpm` has them under their published names as LightningModules, which take seconds to import.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.schedules import cumulative_alphas
from ldm import schedules
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "crossattn", "concat", "hybrid", "adm")
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
IMAGE_KEYS = ("image", "LR_image", "segmentation", "inpainting")  # conditions in the layout of images

# Published arguments that change neither the network nor what it predicts: logging, and terms of the training loss.
WITHOUT_EFFECT = ("log_every_t", "clip_denoised", "use_positional_encodings", "learn_logvar", "logvar_init")
# Published arguments of which only the default is supported.
FIXED = {
    "parameterization": "eps",
    "v_posterior": 0.0,
    "original_elbo_weight": 0.0,
    "l_simple_weight": 1.0,
    "cond_stage_forward": None,
}

Condition = Tensor | Mapping[str, Sequence[Tensor]] | None


class DiffusionWrapper(nn.Module):
    """The network as `diffusion_model`, and how a condition reaches it.

    conditioning_key: None; "crossattn", tokens [N, L, D] joined along L; "concat", images joined to x along the
    channels; "hybrid", both; "adm", class labels [N]. Raises ValueError for another one.
    """

    def __init__(self, unet_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            expected = ", ".join(map(str, CONDITIONING_KEYS))
            raise ValueError(f"conditioning_key {conditioning_key!r}: expected one of {expected}")
        self.diffusion_model = instantiate_from_config(unet_config)
        self.conditioning_key = conditioning_key

    def forward(
        self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] = (), c_crossattn: Sequence[Tensor] = ()
    ) -> Tensor:
        """Predicted noise [N, C, H, W]. x: [N, C, H, W]; t: [N]. Raises ValueError where a condition is missing."""
        key = self.conditioning_key
        if key in ("concat", "hybrid"):
            x = torch.cat([x, *_needed(c_concat, "c_concat", key)], dim=1)
        if key in ("crossattn", "hybrid"):
            return self.diffusion_model(x, t, context=torch.cat([*_needed(c_crossattn, "c_crossattn", key)], dim=1))
        if key == "adm":
            return self.diffusion_model(x, t, y=_needed(c_crossattn, "c_crossattn", key)[0])
        return self.diffusion_model(x, t)


def _needed(conditions: Sequence[Tensor], name: str, key: str) -> Sequence[Tensor]:
    if not conditions:
        raise ValueError(f"conditioning_key {key!r}: the network needs {name}, found no condition")
    return conditions


class DDPM(nn.Module):
    """ε(x_t, t) of images, trained on |ε - ε(x_t, t)| with x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε and t uniform.

    A batch is a dictionary; `first_stage_key` names its images [N, H, W, C] in [-1, 1]. `learning_rate` is an attribute
    that a training script sets. Raises ValueError naming an argument that asks for another kind of prediction,
    TypeError for an unknown one.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int | None = None,  # this and the next four: `ldm.schedules.DEFAULTS` where None
        beta_schedule: str | None = None,  # a name of ldm.schedules; a pixel model's linear betas are "sqrt_linear"
        linear_start: float | None = None,
        linear_end: float | None = None,
        cosine_s: float | None = None,
        given_betas: Sequence[float] | None = None,  # in place of a schedule
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),  # beginnings of names in ckpt_path that are left out
        load_only_unet: bool = False,
        monitor: str | None = None,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,  # of the latents
        channels: int = 3,  # of the latents
        conditioning_key: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,  # learning rate over the steps: ldm.lr_scheduler
        weight_decay: float = 0.01,
        seed: int = 0,
        **published: Any,  # WITHOUT_EFFECT and FIXED
    ):
        super().__init__()
        _check_published(published)
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type {loss_type!r}: expected one of {', '.join(LOSSES)}")
        with torch.device("cpu"):  # even where the model is built without memory for its weights
            ends = {"linear_start": linear_start, "linear_end": linear_end, "cosine_s": cosine_s}
            asked = {"timesteps": timesteps, "beta_schedule": beta_schedule, "given_betas": given_betas, **ends}
            betas = schedules.betas_of(asked)
        self.betas = betas  # [T] float64: no buffer, since those follow the module's precision
        self.loss_type = loss_type
        self.monitor = monitor
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.scheduler_config = scheduler_config
        self.learning_rate = 1e-4
        self.weight_decay = weight_decay
        self.seed = seed
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.model_ema = LitEma(self.model, ema_decay) if use_ema else None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def use_ema(self) -> bool:
        """Whether the network has an averaged twin."""
        return self.model_ema is not None

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """The network has its averaged weights within the block, if there are any."""
        with nullcontext() if self.model_ema is None else self.model_ema.scope(self.model):
            yield

    def init_from_ckpt(self, path: str, ignore_keys: Iterable[str] = (), only_model: bool = False) -> None:
        """Start from the weights in a file, without names that begin with one of `ignore_keys`.

        only_model: the diffusion network's alone. The average starts from them where the file has none.
        Raises FileNotFoundError, and ValueError where the file is damaged or of another model.
        """
        from ldm.checkpoints import load_into, open_checkpoint

        source, ignored = open_checkpoint(path), tuple(ignore_keys)

        def left_out(name: str) -> bool:
            return name.startswith(ignored) or (only_model and not name.startswith("model."))

        used = load_into(
            self,
            source,
            optional=lambda name: left_out(name) or name.startswith(("model_ema.", "scale_factor")),
            rename=lambda name: (
                () if left_out(name) else (name, name.replace(".transformer.text_model.", ".transformer."))
            ),
        )
        if self.model_ema is not None and not any(name.startswith("model_ema.") for name in used):
            self.model_ema.restart(self.model)

    def apply_model(self, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """Predicted noise [N, C, H, W]. x: [N, C, H, W]; t: [N].

        cond: tokens, images or labels as `conditioning_key` wants them, or {"c_concat": [...], "c_crossattn": [...]}.
        """
        if cond is None:
            return self.model(x, t)
        if isinstance(cond, Tensor):
            cond = {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": [cond]}
        return self.model(x, t, **cond)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of equation 4: √ᾱ_t x_0 + √(1 - ᾱ_t) ε. x_start, noise: [N, C, H, W]; t: [N]."""
        alphas = cumulative_alphas(self.betas)
        signal, spread = (
            root.sqrt().to(x_start.device, x_start.dtype)[t, None, None, None] for root in (alphas, 1 - alphas)
        )
        return signal * x_start + spread * noise

    def loss(self, x_start: Tensor, cond: Condition, draws: torch.Generator) -> Tensor:
        """The loss [] of a batch [N, C, H, W], with t and ε from `draws`, a generator on the batch's device."""
        device = x_start.device
        t = torch.randint(self.num_timesteps, x_start.shape[:1], generator=draws, device=device)
        noise = torch.randn(x_start.shape, generator=draws, device=device, dtype=x_start.dtype)
        predicted = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        return LOSSES[self.loss_type](predicted.float(), noise.float())

    def get_input(self, batch: Mapping[str, Any], key: str | None = None) -> Tensor:
        """Images of a batch as [N, C, H, W]. Raises ValueError where the batch has none under that name."""
        key = key or self.first_stage_key
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}, found {', '.join(batch)}")
        image = batch[key]
        image = image[..., None] if image.dim() == 3 else image
        return image.permute(0, 3, 1, 2).contiguous().to(next(self.parameters()).dtype)

    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """What is diffused of a batch: [N, C, H, W]."""
        return self.get_input(batch)

    def conditioning(self, batch: Mapping[str, Any], draws: torch.Generator | None) -> Condition:
        """What the network is told about a batch; with `draws`, some of it is left out as in training."""
        return None

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return list(self.model.parameters())


class LatentDiffusion(DDPM):
    """A diffusion model over the latents of a frozen first stage, with or without conditions.

    cond_stage_config: "__is_unconditional__", "__is_first_stage__" (an image is encoded like the images), or a text or
    class encoder. conditioning_key None becomes "concat" or, without `concat_mode`, "crossattn".
    conditioning_drop: share of the training images whose condition is replaced by the unconditional one: the empty
    prompt, or the encoder's last class (arXiv 2207.12598 §3.2).
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,  # training sets scale_factor to 1 / (standard deviation of its first batch)
        conditioning_drop: float = 0.0,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        load_only_unet: bool = False,
        **common: Any,  # see DDPM
    ):
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL:
            conditioning_key = None
        if num_timesteps_cond not in (None, 1):
            raise ValueError(f"num_timesteps_cond: only 1 is supported, found {num_timesteps_cond}")
        if not 0 <= conditioning_drop <= 1:
            raise ValueError(f"conditioning_drop: expected a number from 0 to 1, found {conditioning_drop}")
        super().__init__(conditioning_key=conditioning_key, **common)
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable and cond_stage_config != UNCONDITIONAL
        self.scale_by_std = scale_by_std
        self.conditioning_drop = conditioning_drop
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        self.first_stage_model = instantiate_from_config(first_stage_config).requires_grad_(False)
        self.cond_stage_model: nn.Module | None = None
        if cond_stage_config == IS_FIRST_STAGE:
            self.cond_stage_trainable = False
            self.cond_stage_model = self.first_stage_model  # its tensors are in published files under both names
        elif cond_stage_config != UNCONDITIONAL:
            self.cond_stage_model = instantiate_from_config(cond_stage_config).requires_grad_(cond_stage_trainable)
        if conditioning_drop and (self.cond_stage_model is None or cond_stage_key in IMAGE_KEYS):
            raise ValueError("conditioning_drop: only captions and classes can be left out, found no such condition")
        self.train(self.training)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """As `nn.Module.train`, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def encode_first_stage(self, x: Tensor, draws: torch.Generator | None = None) -> Tensor:
        """Latents [N, C, h, w] of images [N, 3, H, W] in [-1, 1], times `scale_factor`.

        Of a KL first stage the mean of the posterior, or a sample from `draws`.
        """
        encoded = self.first_stage_model.encode(x)
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.mode() if draws is None else encoded.sample(draws)
        return self.scale_factor.to(encoded) * encoded

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Images [N, 3, H, W] of latents [N, C, h, w]; a VQ first stage moves them to its codebook first."""
        return self.first_stage_model.decode(z / self.scale_factor.to(z))

    def get_learned_conditioning(self, c: Sequence[str] | Tensor) -> Tensor:
        """Tokens [N, L, D] of N prompts or of class labels [N]; of images, what encodes them makes of them."""
        if self.cond_stage_model is None:
            raise ValueError("the model is unconditional, so there is no condition to encode")
        encoded = getattr(self.cond_stage_model, "encode", self.cond_stage_model)(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def unconditional(self, count: int) -> list[str] | Tensor:
        """What stands for no condition: empty prompts, or the last class, [count]."""
        if isinstance(self.cond_stage_model, ClassEmbedder):
            last = self.cond_stage_model.embedding.num_embeddings - 1
            return torch.full((count,), last, device=self.scale_factor.device)
        return [""] * count

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        image = self.get_input(batch)
        with torch.autocast(image.device.type, enabled=False):  # the data themselves stay in full precision
            return self.encode_first_stage(image)

    def conditioning(self, batch: Mapping[str, Any], draws: torch.Generator | None) -> Condition:
        if self.cond_stage_model is None:
            return None
        key = self.cond_stage_key
        if key not in batch:
            raise ValueError(f"cond_stage_key: the batch has no {key!r}, found {', '.join(batch)}")
        condition = self.get_input(batch, key) if key in IMAGE_KEYS else batch[key]
        if draws is not None and self.conditioning_drop:
            condition = self._with_drops(condition, draws)
        with nullcontext() if self.cond_stage_trainable else torch.no_grad():
            return self.get_learned_conditioning(condition)

    def _with_drops(self, condition: Sequence[str] | Tensor, draws: torch.Generator) -> list[str] | Tensor:
        dropped = torch.rand(len(condition), generator=draws, device=draws.device) < self.conditioning_drop
        nothing = self.unconditional(len(condition))
        if isinstance(condition, Tensor):
            return torch.where(dropped, nothing, condition)
        return [n if drop else c for c, n, drop in zip(condition, nothing, dropped.tolist(), strict=True)]

    def trained_parameters(self) -> list[nn.Parameter]:
        trained = [self.model, self.cond_stage_model] if self.cond_stage_trainable else [self.model]
        return [parameter for module in trained for parameter in module.parameters()]


def _check_published(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for another value than the supported one, TypeError for unknown arguments."""
    for name, value in arguments.items():
        if name in FIXED:
            if value != FIXED[name]:
                raise ValueError(f"{name}: only {FIXED[name]!r} is supported, found {value!r}")
        elif name not in WITHOUT_EFFECT:
            raise TypeError(f"unexpected argument {name!r}")
