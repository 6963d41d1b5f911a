"""First stages: image to latents and back (arXiv 2112.10752 §3.1 and appendix G).

Images are [N, C, H, W] in [-1, 1]. `ldm.models.autoencoder` has them under their published names as LightningModules,
which take seconds to import.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from ddim.limits import CLASSES, WIDTH, check_limits
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions import DiagonalGaussianDistribution

COMMITMENT_WEIGHT = 0.25  # VectorQuantizer2's `beta`: of the codebook's own step in its published, swapped form
LEFT_OUT = ("loss.", "model_ema.")  # in published checkpoints of first stages, besides the first stage


class FirstStage(nn.Module, ABC):
    """What the first stages share: encoder, decoder, what training takes. Subclasses add the latents' form.

    `learning_rate` is an attribute that a training script sets. `scheduler_config` describes a schedule of it: an
    object whose `schedule(step)` is a factor.
    Raises ValueError for a `ddconfig` of the other kind of first stage.
    """

    double_z: bool  # whether the encoder gives log-variances too
    lr_g_factor = 1.0  # on the learning rate
    not_trainable: tuple[str, ...] = ()  # arguments that were given and that training does not support

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        lossconfig: Mapping[str, Any] | None = None,
        image_key: str = "image",
        colorize_nlabels: int | None = None,  # published: colours in logged label maps, which are not drawn here
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        seed: int = 0,  # of the noise drawn in training
    ):
        super().__init__()
        ddconfig = _plain(ddconfig)
        check_limits({"embed_dim": embed_dim}, {"embed_dim": WIDTH})
        if ddconfig.get("double_z", True) != self.double_z:
            expected, found = self.double_z, not self.double_z
            raise ValueError(f"ddconfig.double_z must be {expected} for {type(self).__name__}, found {found}")
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.embed_dim = embed_dim
        self.in_channels = ddconfig["in_channels"]
        self.image_key = image_key
        self.monitor = monitor
        self.learning_rate = 4.5e-6
        self.lossconfig = _plain(lossconfig)
        self.scheduler_config = _plain(scheduler_config)
        self.seed = seed

    @abstractmethod
    def reconstruct(self, image: Tensor, draws: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction of a batch and what the loss takes besides it. Random latents are drawn from `draws`."""

    def get_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The images of a batch, [N, C, H, W]. They come with channels last, [N, H, W, C], or [N, H, W] if single.

        Raises ValueError for another layout.
        """
        if self.image_key not in batch:
            raise ValueError(f"image_key: the batch has no {self.image_key!r} (found {', '.join(map(str, batch))})")
        image = batch[self.image_key]
        if image.dim() == 3:
            image = image[..., None]
        if image.dim() != 4 or image.shape[-1] != self.in_channels:
            raise ValueError(
                f"{self.image_key}: expected images [N, H, W, {self.in_channels}], channels last, "
                f"found {list(batch[self.image_key].shape)}"
            )
        return image.permute(0, 3, 1, 2).to(memory_format=torch.contiguous_format, dtype=next(self.parameters()).dtype)

    def init_from_ckpt(self, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
        """Loads a first stage's own checkpoint. Names that begin with one of `ignore_keys` keep their initial values.

        Weights of a loss (discriminator, perceptual network) and running averages in the file are left out.
        Raises FileNotFoundError, and ValueError for a file that is no checkpoint or does not fit.
        """
        from ldm.checkpoints import load_into, open_checkpoint

        ignored = tuple(ignore_keys)
        source = open_checkpoint(path)
        expected = self.state_dict(keep_vars=True)
        unexpected = [name for name in source if name not in expected and not name.startswith((*LEFT_OUT, *ignored))]
        if unexpected:
            names = ", ".join(unexpected[:3])
            raise ValueError(f"{path} does not fit {type(self).__name__}: {len(unexpected)} unexpected: {names}")
        load_into(
            self,
            source,
            optional=lambda name: name.startswith(ignored),
            rename=lambda name: () if name.startswith(ignored) else (name,),
        )


class AutoencoderKL(FirstStage):
    """First stage whose latents have a Gaussian posterior, pulled towards the standard normal."""

    double_z = True

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,  # channels of the latents
        lossconfig: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        **common,  # see FirstStage
    ):
        super().__init__(ddconfig, embed_dim, lossconfig, **common)
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """x: [N, C, H, W]. Returns the posterior of the latents [N, embed_dim, h, w]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """z: [N, embed_dim, h, w]. Returns the image [N, C, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, draws: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """x: [N, C, H, W]. Returns its reconstruction from a sample of the posterior, which is returned too.

        The posterior's mean takes the place of the sample where there is no generator.
        """
        posterior = self.encode(x)
        z = posterior.mode() if draws is None else posterior.sample(draws)
        return self.decode(z), posterior

    def reconstruct(self, image: Tensor, draws: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, posterior = self(image, draws)
        return reconstruction, {"kl": posterior.kl()}


class VQModel(FirstStage):
    """First stage whose latents are vectors of a codebook (arXiv 2012.09841 §3.1)."""

    double_z = False

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,  # width of the codebook's vectors, channels of the latents
        n_embed: int,  # vectors in the codebook
        lossconfig: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        batch_resize_range: tuple[int, int] | None = None,  # published; not for training here
        lr_g_factor: float = 1.0,  # on the learning rate
        remap: str | None = None,  # .npy file of the used indices; the returned indices count those
        sane_index_shape: bool = False,  # indices [N, h, w] instead of one row for all images
        use_ema: bool = False,  # published; not for training here
        **common,  # see FirstStage
    ):
        check_limits({"n_embed": n_embed}, {"n_embed": CLASSES})
        super().__init__(ddconfig, embed_dim, lossconfig, **common)
        z_channels = ddconfig["z_channels"]
        self.n_embed = n_embed
        self.lr_g_factor = lr_g_factor
        asked = {"batch_resize_range": batch_resize_range, "use_ema": use_ema}
        self.not_trainable = tuple(name for name, value in asked.items() if value)
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=COMMITMENT_WEIGHT, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns the latents [N, embed_dim, h, w] before they are moved to the codebook."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """x: [N, C, H, W]. Returns latents [N, embed_dim, h, w], codebook loss [], (None, None, their indices)."""
        return self._nearest(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """quant: latents of the codebook [N, embed_dim, h, w]. Returns the image [N, C, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [N, C, H, W]. Returns its reconstruction and the codebook loss []."""
        quant, codebook_loss, _ = self._nearest(self.encode_to_prequant(x))
        # VQModel's: the interface for latent diffusion quantizes inside its own.
        return VQModel.decode(self, quant), codebook_loss

    def reconstruct(self, image: Tensor, draws: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, codebook_loss = self(image)
        return reconstruction, {"codebook": codebook_loss}

    def _nearest(self, h: Tensor) -> tuple[Tensor, Tensor, tuple]:
        # In reduced precision the distances would not tell close vectors of the codebook apart.
        with torch.autocast(h.device.type, enabled=False):
            return self.quantize(h.to(self.quantize.embedding.weight.dtype))


class VQModelInterface(VQModel):
    """The VQ first stage of latent diffusion: its latents are those before quantization, and decoding quantizes."""

    def __init__(self, embed_dim: int, ddconfig: Mapping[str, Any], **others):  # others: see VQModel
        super().__init__(ddconfig, embed_dim, **others)

    def encode(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]. Returns latents [N, embed_dim, h, w]."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """h: latents [N, embed_dim, h, w]. Returns the image [N, C, H, W], not clamped."""
        return super().decode(h if force_not_quantize else self._nearest(h)[0])


class IdentityFirstStage(nn.Module):
    """No first stage: the latents are the image. With `vq_interface`, `quantize` answers as a codebook's would."""

    def __init__(self, *args, vq_interface: bool = False, **kwargs):
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x

    def decode(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args, **kwargs):
        return (x, None, (None, None, None)) if self.vq_interface else x

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x


def _plain(config):
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
