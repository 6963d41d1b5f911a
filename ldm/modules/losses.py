"""What the first stages are trained with: reconstruction plus a regulariser of the latents, without other networks."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import instantiate_from_config

NO_LOSS = "torch.nn.Identity"  # what published configurations put in place of a loss for inference
DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}


class ReconstructionLoss(nn.Module):
    """distance(image, reconstruction) + kl_weight · KL / values per image + codebook_weight · codebook loss.

    The distance is a mean over the values of the image, and the KL divergence, in nats per image, is divided by their
    number: both are the sums per image of arXiv 2112.10752, appendix G, in other units, so its weights hold here.
    Raises ValueError for another `reconstruction` than l1 and l2.
    """

    def __init__(self, reconstruction: str = "l1", kl_weight: float = 1e-6, codebook_weight: float = 1.0):
        super().__init__()
        if reconstruction not in DISTANCES:
            raise ValueError(f"reconstruction: expected one of {', '.join(DISTANCES)}, found {reconstruction!r}")
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.codebook_weight = codebook_weight

    def forward(
        self, image: Tensor, reconstruction: Tensor, kl: Tensor | None = None, codebook: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """image, reconstruction: [N, C, H, W]; kl: [N] in nats; codebook: []. Returns the loss [] and its terms."""
        loss = DISTANCES[self.reconstruction](reconstruction, image)
        terms = {"rec_loss": loss.detach()}
        if kl is not None:
            loss = loss + self.kl_weight * kl.mean() / image[0].numel()
            terms["kl_loss"] = kl.mean().detach()
        if codebook is not None:
            loss = loss + self.codebook_weight * codebook
            terms["quant_loss"] = codebook.detach()
        return loss, terms


def training_loss(lossconfig: Mapping[str, Any] | None) -> ReconstructionLoss:
    """The loss of a first stage's `lossconfig`, a plain dictionary; the default one where it names none.

    Raises ValueError for a published loss with perceptual and adversarial networks.
    """
    if lossconfig is None or lossconfig.get("target") == NO_LOSS:
        return ReconstructionLoss()
    supported = f"{__name__}.{ReconstructionLoss.__name__}"
    if lossconfig.get("target") != supported:
        raise ValueError(f"lossconfig: training supports {supported} or none, found {lossconfig.get('target')}")
    return instantiate_from_config(lossconfig)
