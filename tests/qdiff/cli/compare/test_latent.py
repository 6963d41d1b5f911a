"""compare_methods.py on latent models: conditioning, guidance, samplers, and errors along the steps."""

from types import SimpleNamespace

import pytest
import torch
from comparing import in_this_process, rows_of
from latents import BUNDLED, LDM, assert_close, pixels, sample_ldm, txt2img
from running import call, passed, refused, tree
from safetensors.torch import load_file
from torch import nn

from ddim.samplers import to_images
from ldm.pipeline import Pipeline
from ldm.samplers import make_sampler
from ldm.schedules import beta_schedule
from qdiff.calibration.trajectories import load_trajectories
from qdiff.checkpoints.native import load_checkpoint
from qdiff.cli.compare.parts import judged
from qdiff.cli.compare.sampling import Reference, Walk, accumulated, follow, single_step
from qdiff.cli.models.any_family import LoadedModel
from qdiff.evaluation.similarity import to_uint8

COMPARE = "compare_methods"
SHORT = ("--timesteps", 4, "--cali_st", 2, "--cali_n", 2, "--n_samples", 3, "--batch_size", 2)
BETAS = beta_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195)


@pytest.fixture(scope="module")
def compared(latent, tmp_path_factory):
    """name -> folder of a comparison of `nearest`."""
    asked = {
        "ldm": ("--seed", 41),
        "cin": ("--classes", 3, "0-1", "--scale", 2),
        "sd": ("--prompt", "a photo of a cat"),
    }
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        for name, flags in asked.items():
            model = ("-r", getattr(latent, name).folder)
            passed(call(COMPARE, *model, *SHORT, *flags, "--methods", "nearest", "--outdir", out / name))
    return {name: out / name for name in asked}


@pytest.mark.parametrize("name", ["ldm", "cin", "sd"])
def test_what_it_finds(compared, name):
    out, (first, row) = compared[name], rows_of(compared[name])
    assert first["label"] == "float" and row["label"] == "nearest" and row["fd"] is None
    assert len(row["accumulated"]) == 5 and row["accumulated"][0] == 0
    assert row["accumulated"][1] == pytest.approx(row["single_step"][0], rel=1e-3)
    recipe = load_checkpoint(out / "nearest_w4a8.safetensors").recipe
    assert recipe.weights.bits == 4 and "prompt_accuracy" not in row
    for part in ("float", "nearest_w4a8"):
        images = load_file(out / part / "images.safetensors")["images"]
        assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1


def test_conditioning(latent, compared):
    """States and images take what is asked for in turn, each from its own first one on."""
    rows = latent.cin.state["cond_stage_model.embedding.weight"]
    states = load_trajectories(compared["cin"] / "float" / "shard_00000.safetensors")
    assert torch.equal(states.extra["cs"][0][:, 0], rows[[3, 0]]) and "ucs" in states.extra
    assert load_trajectories(compared["sd"] / "float" / "shard_00000.safetensors").extra.keys() == {"cs", "ucs"}
    assert not load_trajectories(compared["ldm"] / "float" / "shard_00000.safetensors").extra


def test_images_are_those_of_the_sampling_scripts(latent, compared, tmp_path):
    """The float model's, with the same seed and the same classes or prompt."""
    runs = {
        "ldm": sample_ldm(latent.ldm, tmp_path / "ldm", *LDM),
        "cin": sample_ldm(latent.cin, tmp_path / "cin", *LDM, "--classes", 3, "0-1", "--scale", 2, "--seed", 1234),
        "sd": txt2img(latent.sd, tmp_path / "sd", "--prompt", "a photo of a cat", "--seed", 1234, "--n_iter", 2),
    }
    for name, run in runs.items():
        found = to_uint8(load_file(compared[name] / "float" / "images.safetensors")["images"]).permute(0, 2, 3, 1)
        paths = sorted((run / ("samples" if name == "sd" else "img")).iterdir())[:3]
        assert_close(list(found), [pixels(path) for path in paths])


class Predicted(nn.Module):
    """A network whose prediction depends on the timestep alone."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.like = answers, nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return torch.stack([self.answers[round(float(moment), 2)] for moment in t]).to(x)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_errors_of_known_predictions(sampler):
    """Predictions that are off by a known amount at every call: the errors are the path's coefficients times it."""
    pipeline = Pipeline((2, 3, 3), BETAS, sampler, steps=5, seed=3)
    path, draws = pipeline.path(), torch.Generator().manual_seed(0)
    moments = {round(float(t), 2) for t in path.t}
    answers = {t: torch.randn(2, 3, 3, generator=draws) for t in moments}
    off = {t: 0.1 * torch.randn(2, 3, 3, generator=draws) for t in moments}
    networks = Predicted(answers), Predicted({t: answers[t] + off[t] for t in moments})
    start = torch.randn(4, 2, 3, 3, generator=draws)
    model = LoadedModel(
        networks[0],
        {},
        None,
        lambda batch: make_sampler(sampler, start, steps=5, betas=BETAS, eta=0.0, noise=None),
        lambda network, batch: network,
        to_images,
    )
    walks, ends = [Walk(3), Walk(3)], []
    for network, walk in zip(networks, walks, strict=True):
        ends.append(follow(model, network, range(4), walk, lambda call: None))
    reference = Reference(to_images(ends[0]), walks[0], ends[0][:3])
    wrong = torch.stack([off[round(float(t), 2)] for t in path.t]).double()
    per_state = torch.einsum("ml,lchw->mchw", path.coefficients, wrong)
    steps = [path.first_call(step) for step in range(6)]
    expected = per_state[steps].square().mean((1, 2, 3))
    found = accumulated(walks[1], ends[1], reference)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    calls = [range(path.first_call(step), path.first_call(step + 1)) for step in range(5)]
    alone = [sum(path.coefficients[path.next_state(i), i] * wrong[i] for i in these) for these in calls]
    expected = torch.stack([error.square().mean() for error in alone])
    found = single_step(model, networks[1], range(4), reference, path, lambda call: None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    assert max(map(len, calls)) == (2 if sampler == "plms" else 1)


@pytest.mark.parametrize("sampler", ["plms", "dpm_solver"])
@pytest.mark.cases("plms")
def test_samplers(latent, monkeypatch, tmp_path, sampler):
    in_this_process(monkeypatch)
    flags = ("--prompt", "a cat", "--sample_type", sampler, "--methods", "nearest", "--outdir", tmp_path)
    passed(call(COMPARE, "-r", latent.sd.folder, *SHORT, *flags))
    row = rows_of(tmp_path)[1]
    assert (len(row["single_step"]), len(row["accumulated"])) == (4, 5)


@pytest.mark.long
def test_whether_prompts_are_shown(monkeypatch, tmp_path):
    """The bundled text model's images, judged by the bundled classifier."""
    in_this_process(monkeypatch)
    (tmp_path / "prompts.txt").write_text("a photo of a ship\na photo of a horse\n")
    flags = ("-r", BUNDLED / "cifar10-sd", "--scale", 3, "--n_samples", 2, "--cali_st", 1, "--cali_n", 1)
    flags += ("--methods", "nearest", "--weight_bit", 8, "--batch_size", 2, "--from-file", "prompts.txt")
    result = passed(call(COMPARE, *flags, "--timesteps", 6, "--sample_type", "plms", "--outdir", "out"))
    assert "prompt's class named" in result.out
    first, row = rows_of(tmp_path / "out")
    assert first["prompt_accuracy"] == 1 and row["prompt_accuracy"] in (0, 0.5, 1)
    assert isinstance(row["fd_float"], float)


def test_prompts_of_something_else_are_not_judged():
    images = torch.rand(2, 3, 32, 32)
    for family, entries in (("text", ("a castle", "a cat")), ("latent", (3, 4)), ("latent", ())):
        model = SimpleNamespace(family=family, entries=entries)
        assert judged(SimpleNamespace(model=model), images).keys() == {"fd"}


@pytest.mark.parametrize(
    ("name", "flags", "parts"),
    [
        (None, (), ("--config, -r", "name a pixel model")),
        ("ldm", ("--skip_type", "quad"), ("--skip_type", "pixel models only")),
        ("ldm", ("--prompt", "a cat"), ("--prompt", "unconditional")),
        ("ldm", ("--sample_type", "generalized"), ("--sample_type generalized", "ddim, plms")),
        ("cin", ("--classes", 5), ("--classes 5", "0 to 4")),
        ("sd", (), ("--prompt, --from-file", "give one")),
        ("ldm", ("--cali_st", 5), ("--cali_st 5", "4 steps")),
        ("ldm", ("--batch_size", 0), ("--batch_size", "'0'")),
    ],
)
def test_bad_input(latent, tmp_path, name, flags, parts):
    model = () if name is None else ("-r", getattr(latent, name).folder)
    refused(call(COMPARE, *model, *SHORT, "--outdir", "out", *flags), *parts)
    assert tree(tmp_path) == {}
