import pytest
import torch

from ldm.modules.losses import ReconstructionLoss, training_loss

PUBLISHED = "ldm.modules.losses.LPIPSWithDiscriminator", "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 3, 4, 4, generator=generator)  # image and reconstruction, 48 values each


def test_terms_are_weighted_and_in_units_of_one_value(pair):
    image, reconstruction = pair
    loss = ReconstructionLoss("l2", kl_weight=0.5, codebook_weight=3.0)
    kl, codebook = torch.tensor([10.0, 30.0]), torch.tensor(0.25)
    squared = (image - reconstruction).square().mean()
    total, terms = loss(image, reconstruction, kl=kl, codebook=codebook)
    assert torch.allclose(total, squared + 0.5 * 20 / 48 + 3 * 0.25)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"rec_loss": squared.item(), "kl_loss": 20.0, "quant_loss": 0.25}
    )


def test_distance_is_absolute_unless_asked_otherwise(pair):
    assert torch.allclose(ReconstructionLoss()(*pair)[0], (pair[0] - pair[1]).abs().mean())
    with pytest.raises(ValueError, match="reconstruction: .*l1, l2.*'l3'"):
        ReconstructionLoss("l3")


def test_configurations_without_a_loss_train_with_the_default_one():
    for lossconfig in (None, {"target": "torch.nn.Identity"}):
        assert vars(training_loss(lossconfig))["kl_weight"] == 1e-6
    asked = {"target": "ldm.modules.losses.ReconstructionLoss", "params": {"reconstruction": "l2", "kl_weight": 0.1}}
    loss = training_loss(asked)
    assert (loss.reconstruction, loss.kl_weight) == ("l2", 0.1)


@pytest.mark.parametrize("target", PUBLISHED)
def test_losses_that_need_other_networks_are_refused_by_name(target):
    with pytest.raises(ValueError, match=rf"ldm\.modules\.losses\.ReconstructionLoss or none, found {target}"):
        training_loss({"target": target, "params": {"disc_start": 50001}})
