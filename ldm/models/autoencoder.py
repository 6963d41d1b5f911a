"""Training of first stages, under the published names.

The first stages themselves are in `ldm.models.first_stages`; here they are LightningModules, which train on a
reconstruction loss of our own. The published perceptual and adversarial losses need other networks' weights, and a
configuration that names them serves inference.
"""

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.lr_scheduler import scheduled
from ldm.models import first_stages
from ldm.models.first_stages import IdentityFirstStage
from ldm.modules.losses import training_loss
from ldm.seeds import generator

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface", "psnr"]
ADAM_BETAS = (0.5, 0.9)
PEAK = 2.0  # width of the range of pixel values


class Training(pl.LightningModule):
    """What a first stage needs to be trained by Lightning; to be inherited beside it.

    What is drawn in training depends on (seed, epoch, batch, process) alone, so an interrupted training goes on as if
    it had not been.
    """

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        image = self.get_input(batch)
        draws = generator(self.seed, self.current_epoch, batch_idx, self.global_rank)
        reconstruction, regularisers = self.reconstruct(image, draws)
        loss, terms = self._loss()(image, reconstruction, **regularisers)
        named = {"train/loss": loss.detach(), **{f"train/{name}": value for name, value in terms.items()}}
        self.log_dict(named, prog_bar=True, batch_size=len(image))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        image = self.get_input(batch)
        reconstruction, regularisers = self.reconstruct(image, None)
        _, terms = self._loss()(image, reconstruction, **regularisers)
        named = {f"val/{name}": value for name, value in terms.items()}
        named["val/psnr"] = psnr(image, reconstruction).mean()
        self.log_dict(named, prog_bar=True, sync_dist=True, batch_size=len(image))

    def configure_optimizers(self):
        """Adam at `learning_rate`, with a factor on it at each step if there is a `scheduler_config`.

        Raises ValueError where the configuration asks for training that is not supported.
        """
        self._loss()  # an unsupported one is named before the first batch
        if self.not_trainable:
            raise ValueError(f"{type(self).__name__}: training does not support {', '.join(self.not_trainable)}")
        rate = self.learning_rate * self.lr_g_factor
        optimizer = torch.optim.Adam(self.parameters(), lr=rate, betas=ADAM_BETAS)
        return scheduled(optimizer, self.scheduler_config)

    def _loss(self) -> nn.Module:
        # Made when training asks for it, so that a configuration with an unsupported loss still serves inference.
        return training_loss(self.lossconfig)


class AutoencoderKL(first_stages.AutoencoderKL, Training):
    """A KL first stage that Lightning trains."""


class VQModel(first_stages.VQModel, Training):
    """A VQ first stage that Lightning trains."""


class VQModelInterface(first_stages.VQModelInterface, VQModel):
    """The VQ first stage of latent diffusion, which Lightning trains."""


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image's reconstruction, clamped to [-1, 1]: [N]. Both [N, C, H, W]."""
    error = (image - reconstruction.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(PEAK**2 / error)
