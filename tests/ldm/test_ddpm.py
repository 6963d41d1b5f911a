"""Noise prediction: the diffused images, the loss, what conditions do, the average, and published arguments."""

import pytest
import torch
from torch import nn

from ddim.schedules import cumulative_alphas
from ldm.models.diffusion.ddpm import DDPM, DiffusionWrapper, LatentDiffusion
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.seeds import generator
from ldm.util import instantiate_from_config

PIXEL = {
    "target": "ddim.network.DDPMUNet",
    "params": {
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "image_size": 8,
        "dropout": 0.0,
    },
}
UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 2,
    },
}
IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 3,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 8,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
}
CLASSES = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"embed_dim": 16, "n_classes": 11, "key": "class_label"},
}


def latent(unet=UNET, first=IDENTITY, cond="__is_unconditional__", **options):
    torch.manual_seed(0)
    return LatentDiffusion(first, cond, unet_config=unet, image_size=8, channels=3, **options)


def attending(**changes):
    extra = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 16}
    return {**UNET, "params": {**UNET["params"], **extra, **changes}}


def of_classes(**options):
    options = {"concat_mode": False, "cond_stage_key": "class_label", **options}
    return latent(attending(), **{"cond": CLASSES, **options})


@pytest.fixture
def batch():
    draws = torch.Generator().manual_seed(1)
    image = torch.rand(4, 8, 8, 3, generator=draws) * 2 - 1
    return {"image": image, "class_label": torch.tensor([0, 3, 9, 1]), "caption": ["a", "b", "c", "d"]}


def test_diffused_images_have_the_mean_and_spread_of_equation_4():
    model = DDPM(PIXEL, beta_schedule="sqrt_linear")
    t = torch.tensor([0, 250, 999]).repeat_interleave(20_000)
    noise = torch.randn(60_000, 1, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = model.q_sample(torch.full_like(noise, 0.7), t, noise).view(3, -1)
    alphas = cumulative_alphas(torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64))[[0, 250, 999]]
    spread = (1 - alphas).sqrt()
    assert ((x.mean(1) - 0.7 * alphas.sqrt()).abs() < 4 * spread / 20_000**0.5).all()
    assert ((x.std(1) / spread - 1).abs() < 0.02).all()


def test_the_latent_family_starts_from_betas_linear_in_their_roots():
    model = latent(linear_start=0.0015, linear_end=0.0195)
    expected = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    assert model.betas.dtype == torch.float64 and torch.equal(model.betas, expected) and model.num_timesteps == 1000
    assert torch.equal(DDPM(PIXEL, given_betas=[0.1, 0.2]).betas, torch.tensor([0.1, 0.2], dtype=torch.float64))


class Oracle(nn.Module):
    """Knows x_0 and so predicts the noise exactly."""

    def __init__(self, x_start, betas):
        super().__init__()
        self.x_start, self.alphas = x_start, cumulative_alphas(betas)

    def forward(self, x, t):
        alpha = self.alphas[t, None, None, None]
        return (x - alpha.sqrt() * self.x_start) / (1 - alpha).sqrt()


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_is_zero_for_the_true_noise_and_its_moment_for_none(kind, batch):
    model = DDPM(PIXEL, loss_type=kind).double()
    x_start = model.get_input(batch)
    model.model.diffusion_model = Oracle(x_start, model.betas)
    assert model.loss(x_start, None, generator(1)) < 1e-6
    model.model.diffusion_model = Silent()
    losses = torch.stack([model.loss(x_start, None, generator(1, i)) for i in range(50)])
    moment = {"l1": (2 / torch.pi) ** 0.5, "l2": 1.0}[kind]  # E|ε|, E ε²
    assert losses.mean() == pytest.approx(moment, rel=0.03)


class Silent(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


def test_draws_depend_on_seed_and_batch_alone(batch):
    torch.manual_seed(0)
    model = DDPM(PIXEL)
    model.log = lambda *args, **kwargs: None
    one, again, other = (model.training_step(batch, index) for index in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    model.seed = 1
    assert not torch.equal(model.training_step(batch, 0), one)


class Recorder(nn.Module):
    """Predicts zeros and keeps what it was called with."""

    def forward(self, x, t, **conditions):
        self.x, self.conditions = x, conditions
        return torch.zeros_like(x[:, :3])


@pytest.mark.parametrize("key", [None, "crossattn", "concat", "hybrid", "adm"])
def test_how_conditions_reach_the_network(key):
    wrapper = DiffusionWrapper({"target": "torch.nn.Identity"}, key)
    network = wrapper.diffusion_model = Recorder()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    image, tokens, labels = torch.randn(2, 1, 8, 8), torch.randn(2, 5, 16), torch.tensor([4, 5])
    given = {
        None: {},
        "crossattn": {"c_crossattn": [tokens, tokens]},
        "concat": {"c_concat": [image]},
        "hybrid": {"c_concat": [image], "c_crossattn": [tokens]},
        "adm": {"c_crossattn": [labels]},
    }[key]
    wrapper(x, t, **given)
    assert torch.equal(network.x, torch.cat([x, image], 1) if key in ("concat", "hybrid") else x)
    expected = {"crossattn": ("context", torch.cat([tokens, tokens], 1)), "hybrid": ("context", tokens)}
    expected["adm"] = ("y", labels)
    found = list(network.conditions.items())
    assert len(found) == (key in expected) and all(
        name == expected[key][0] and torch.equal(value, expected[key][1]) for name, value in found
    )
    if key is not None:
        with pytest.raises(ValueError, match=f"'{key}': the network needs c_"):
            wrapper(x, t)


def test_conditioning_key_defaults_as_published():
    assert latent().model.conditioning_key is None
    assert latent(conditioning_key="crossattn").model.conditioning_key is None  # unconditional wins
    assert of_classes().model.conditioning_key == "crossattn"
    assert of_classes(concat_mode=True).model.conditioning_key == "concat"
    with pytest.raises(ValueError, match="conditioning_key 'film': expected one of None, crossattn"):
        of_classes(conditioning_key="film")


def test_labels_condition_the_prediction(batch):
    model = of_classes().eval()
    with torch.no_grad():
        for parameter in model.model.parameters():  # the last layers begin at zero
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        cond = model.conditioning(batch, None)
        x, t = torch.randn(4, 3, 8, 8), torch.tensor([5] * 4)
        one = model.apply_model(x, t, cond)
        same = model.apply_model(x, t, {"c_crossattn": [cond]})
        other = model.apply_model(x, t, cond.roll(1, 0))
    assert cond.shape == (4, 1, 16) and torch.equal(one, same) and not torch.allclose(one, other)


def test_an_image_as_condition_is_encoded_like_the_images(batch):
    unet = {**UNET, "params": {**UNET["params"], "in_channels": 6}}
    model = latent(unet, first=KL, cond="__is_first_stage__", scale_factor=2.0)
    assert model.model.conditioning_key == "concat" and model.cond_stage_model is model.first_stage_model
    cond = model.conditioning(batch, None)
    # Published models scale the latents that are diffused, and not those that condition.
    torch.testing.assert_close(2 * cond, model.latents(batch))
    assert model.loss(model.latents(batch), cond, generator(0)).isfinite()


def test_conditions_are_left_out_at_the_given_rate():
    model = of_classes(conditioning_drop=0.3)
    labels = torch.zeros(4000, dtype=torch.long)
    seen = []
    model.get_learned_conditioning = lambda c: seen.append(c) or c
    model.conditioning({"class_label": labels}, generator(7))
    model.conditioning({"class_label": labels}, None)
    assert set(seen[0].tolist()) == {0, 10} and (seen[0] == 10).float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(seen[1], labels)
    assert of_classes().unconditional(2).tolist() == [10, 10]


class Words(nn.Module):
    """Stands for a text encoder."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode(self, prompts):
        self.seen.append(prompts)
        return torch.zeros(len(prompts), 2, 16)


def test_left_out_captions_are_empty_prompts(batch):
    model = of_classes(cond_stage_key="caption", conditioning_drop=1.0)
    model.cond_stage_model = Words()
    model.conditioning(batch, generator(0))
    model.conditioning(batch, None)
    assert model.cond_stage_model.seen == [[""] * 4, ["a", "b", "c", "d"]]


def test_frozen_stages_stay_frozen(batch):
    model = of_classes(first=KL)
    model.train()
    assert model.training and not model.first_stage_model.training and not model.cond_stage_model.training
    model.loss(model.latents(batch), model.conditioning(batch, None), generator(0)).backward()
    with_gradient = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"model"}
    trained = {id(parameter) for parameter in model.trained_parameters()}
    assert trained == {id(parameter) for parameter in model.model.parameters()}


def test_a_trainable_condition_gets_gradients(batch):
    model = of_classes(cond_stage_trainable=True).train()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.02)
    model.loss(model.latents(batch), model.conditioning(batch, None), generator(0)).backward()
    table = model.cond_stage_model.embedding.weight
    assert table.grad.abs().sum(1).gt(0).nonzero().flatten().tolist() == [0, 1, 3, 9]
    assert any(parameter is table for parameter in model.trained_parameters())


def test_latents_of_a_kl_first_stage(batch):
    model = latent(first=KL, scale_factor=0.5)
    image = model.get_input(batch)
    posterior = model.first_stage_model.encode(image)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    torch.testing.assert_close(model.encode_first_stage(image), 0.5 * posterior.mean)
    torch.testing.assert_close(model.encode_first_stage(image, generator(4)), 0.5 * posterior.sample(generator(4)))
    decoded = model.first_stage_model.decode(posterior.mean)
    torch.testing.assert_close(model.decode_first_stage(0.5 * posterior.mean), decoded)


def test_published_key_names():
    model = of_classes(scale_factor=0.18215)
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"model", "model_ema", "cond_stage_model", "scale_factor"}
    assert state["scale_factor"] == pytest.approx(0.18215)
    averaged = {"diffusion_modelinput_blocks00weight", "decay", "num_updates"}
    assert "model.diffusion_model.input_blocks.0.0.weight" in state
    assert averaged <= {name.removeprefix("model_ema.") for name in state}
    assert not any(name.startswith("model_ema") for name in of_classes(use_ema=False).state_dict())


def test_validation_uses_the_average_and_gives_the_weights_back(batch):
    model = DDPM(PIXEL)
    logged = {}
    model.log = lambda name, value, **options: logged.update({name: value})
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    one = model.validation_step(batch, 0)
    for buffer in model.model_ema.names.values():
        model.model_ema.get_buffer(buffer).add_(0.05)
    other = model.validation_step(batch, 0)
    assert not torch.equal(one, other) and set(logged) == {"val/loss_simple_ema"}
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"parameterization": "x0"}, "parameterization: only 'eps' is supported, found 'x0'"),
        ({"parameterization": "v"}, "parameterization: only 'eps' is supported, found 'v'"),
        ({"v_posterior": 0.5}, "v_posterior: only 0.0 is supported, found 0.5"),
        ({"loss_type": "huber"}, "loss_type 'huber': expected one of l1, l2"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"num_timesteps_cond": 5}, "num_timesteps_cond: only 1"),
        ({"conditioning_drop": 0.1}, "conditioning_drop: only captions and classes"),
        ({"conditioning_drop": 2}, "conditioning_drop: expected a number from 0 to 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_model_is_refused(option, words):
    with pytest.raises(ValueError, match=words):
        latent(**option)


def test_published_configurations_load():
    """The arguments of the published configurations, those without effect among them."""
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "class_label",
        "image_size": 8,
        "channels": 3,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215,
        "use_ema": False,
        "clip_denoised": False,
        "learn_logvar": True,
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler"},
        "unet_config": attending(),
        "first_stage_config": IDENTITY,
        "cond_stage_config": CLASSES,
    }
    model = instantiate_from_config({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params})
    assert isinstance(model.cond_stage_model, ClassEmbedder) and model.model_ema is None
    with pytest.raises(ValueError, match="unexpected argument 'colour'"):
        instantiate_from_config(
            {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**params, "colour": 1}}
        )


def test_starting_from_a_file(tmp_path):
    model, other = latent(), latent()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "whole.ckpt")
    bare = {name: value for name, value in model.state_dict().items() if not name.startswith("model_ema.")}
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    other = latent(ckpt_path=tmp_path / "whole.ckpt")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    other = latent(ckpt_path=tmp_path / "bare.ckpt")
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    assert torch.equal(other.model_ema.get_buffer("diffusion_modelinput_blocks00weight"), weight)
    other = latent(ckpt_path=tmp_path / "bare.ckpt", ignore_keys=["model.diffusion_model.out."])
    assert not torch.equal(other.model.diffusion_model.out[2].weight, model.model.diffusion_model.out[2].weight)
    assert torch.equal(other.model.diffusion_model.input_blocks[0][0].weight, weight)


def test_builds_without_memory():
    with torch.device("meta"):
        model = of_classes(scale_factor=0.3)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.scale_factor.item() == pytest.approx(0.3) and not model.betas.is_meta
