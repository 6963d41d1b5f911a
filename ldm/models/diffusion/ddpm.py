"""Training of noise-predicting diffusion models, in pixels and in latents, under the published names.

The models themselves are in `ldm.models.diffusion.models`; here they are LightningModules.
"""

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.lr_scheduler import scheduled
from ldm.models.diffusion import models
from ldm.models.diffusion.models import DiffusionWrapper
from ldm.seeds import generator

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion"]
logger = logging.getLogger(__name__)

VALIDATION = 2**63  # takes the place of the step in the seed of validation draws, so that they are always the same


class DDPM(models.DDPM, pl.LightningModule):
    """A diffusion model that Lightning trains.

    Training draws (t, ε and what is dropped) depend on (seed, step, process) alone, so an interrupted training goes on
    as if it had not been.
    """

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        draws = generator(self.seed, *self._position(batch_idx), self.global_rank, device=self.device)
        loss = self.loss(self.latents(batch), self.conditioning(batch, draws), draws)
        self.log("train/loss_simple", loss.detach(), prog_bar=True)
        return loss

    def _position(self, batch_idx: int) -> tuple[int, int]:
        """(optimizer step, batch of it): a resumed training counts them on, which Lightning's batch_idx need not do."""
        if self._trainer is None:
            return 0, batch_idx
        return self.trainer.global_step, batch_idx % self.trainer.accumulate_grad_batches

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        draws = generator(self.seed, VALIDATION, batch_idx, self.global_rank, device=self.device)
        with self.ema_scope():
            x_start = self.latents(batch)
            loss = self.loss(x_start, self.conditioning(batch, None), draws)
        name = "val/loss_simple_ema" if self.use_ema else "val/loss_simple"
        self.log(name, loss, prog_bar=True, sync_dist=True, batch_size=len(x_start))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An optimizer step, then one of the average: before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        if self.model_ema is not None:
            self.model_ema(self.model)

    def configure_optimizers(self) -> Any:
        """AdamW at `learning_rate`, with a factor on it at each step if there is a `scheduler_config`."""
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return scheduled(optimizer, self.scheduler_config)


class LatentDiffusion(models.LatentDiffusion, DDPM):
    """A latent diffusion model that Lightning trains."""

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """With scale_by_std: make the latents' standard deviation 1, measured on the very first batch."""
        if not self.scale_by_std or self.trainer.global_step > 0 or batch_idx > 0:
            return
        self.scale_factor.fill_(1.0)
        scale = 1 / self.latents(batch).std()
        # One value for all processes, though each has its own batch.
        self.scale_factor.copy_(self.trainer.strategy.broadcast(scale, 0))
        logger.info("scale_factor %.6g: latents of the first batch have standard deviation 1", self.scale_factor.item())
