"""The published methods by --method from each of the three sampling scripts: what comes out, and that it comes back."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from running import Result, call, passed, tree

from qdiff.checkpoints.native import load_checkpoint
from qdiff.nn.layers import act_quantizers, quant_layers

FOUR = ("q-diffusion", "eda-dm", "quest", "accuquant")
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8)
FEW = ("--cali_st", 2, "--cali_n", 2, "--cali_iters", 2, "--cali_iters_a", 2, "--cali_batch_size", 2)
# Script -> its flags for one image with a sampler of 8 steps, which groups of five do not divide: plain DDIM, DDIM with
# noise, and guided PLMS.
SCRIPTS = {
    "sample_diffusion_ddim": ("--timesteps", 8, "--max_images", 1),
    "sample_diffusion_ldm": ("-c", 8, "-e", 1, "-n", 1, "--batch_size", 2, "--seed", 41),
    "txt2img": ("--ddim_steps", 8, "--plms", "--scale", 3, "--n_iter", 1, "--n_samples", 1, "--skip_grid"),
}
# Each method from one script, and one with sets per step from another.
EACH = [("sample_diffusion_ddim", method) for method in FOUR]
EACH += [("sample_diffusion_ldm", "quest")]
REST = [(script, method) for script in SCRIPTS for method in FOUR if (script, method) not in EACH]
EVERY = EACH + [pytest.param(*case, marks=pytest.mark.long) for case in REST]


@dataclass(frozen=True)
class Run:
    """A script's result, its flags for the model, and the folder of its own that it made."""

    result: Result
    folder: Path
    line: tuple

    @property
    def checkpoint(self) -> Path:
        return self.folder / "ckpt.safetensors"

    @property
    def images(self) -> list[bytes]:
        """The images, without the plot of losses beside them."""
        return [path.read_bytes() for path in sorted(self.folder.glob("*/*.png"))]


@pytest.fixture(scope="module")
def lines(tiny, latent):
    """Script -> it with its flags, for its tiny model."""
    model = {
        "sample_diffusion_ddim": tiny.model,
        "sample_diffusion_ldm": ("-r", latent.ldm.ckpt),
        "txt2img": ("--ckpt", latent.sd.ckpt, "--prompt", "a photo of a cat"),
    }
    return {script: (script, *model[script], *flags) for script, flags in SCRIPTS.items()}


def run(line, out, *flags):
    """A run that ends with exit code 0, in a folder `out`."""
    result = call(*line, *flags, "--outdir" if line[0] == "txt2img" else "-l", out)
    assert result.code == 0, result.err
    (folder,) = out.iterdir() if line[0] == "txt2img" else (out / "samples").iterdir()
    return Run(result, folder, line)


@pytest.fixture(scope="module")
def runs(lines, tmp_path_factory):
    """(script, method) -> the run that calibrates by it; each is made once."""
    made = {}

    def get(script, method):
        if (script, method) not in made:
            flags = (*W4A8, "--method", method, *FEW)
            made[script, method] = run(lines[script], tmp_path_factory.mktemp("run") / "out", *flags)
        return made[script, method]

    return get


@pytest.mark.parametrize(("script", "method"), EVERY)
def test_a_run_ends_with_an_image_and_a_checkpoint(runs, script, method):
    found = runs(script, method)
    assert len(found.images) == 1
    # The original's format has one set of scales, and one kind of grid: what it cannot hold is said in one line.
    fits = (found.folder / "ckpt.pth").exists()
    assert fits == (method == "q-diffusion") and (len(found.result.complaints) == 0) == fits
    assert fits or "no ckpt.pth" in found.result.complaints[0]
    assert not (found.folder / "calibration").exists()
    loaded = load_checkpoint(found.checkpoint)
    assert loaded.recipe.name == method
    assert all(layer.frozen for layer in quant_layers(loaded.network).values())
    sets = {"quest": 2, "accuquant": 2}.get(method, 1)
    assert {len(quantizer.scale) for quantizer in act_quantizers(loaded.network).values()} == {sets}
    assert all(quantizer.scale.isfinite().all() for quantizer in act_quantizers(loaded.network).values())


@pytest.mark.parametrize(
    "script",
    [
        script if script == "sample_diffusion_ddim" else pytest.param(script, marks=pytest.mark.long)
        for script in SCRIPTS
    ],
)
def test_methods_give_images_of_their_own(runs, script):
    assert len({runs(script, method).images[0] for method in FOUR}) == 4


@pytest.mark.parametrize(("script", "method"), EVERY)
def test_a_checkpoint_gives_the_calibrating_runs_image(runs, tmp_path, script, method):
    """With the sampler that it was calibrated for there is nothing to warn of."""
    found = runs(script, method)
    again = run(found.line, tmp_path / "out", "--ptq", "--quant_act", "--cali_ckpt", found.checkpoint)
    assert again.result.complaints == [] and again.images == found.images


@pytest.mark.parametrize(("script", "method"), EVERY)
def test_a_printed_plan_given_back_makes_the_same_plan(lines, tmp_path, script, method):
    shown = passed(call(*lines[script], *W4A8, "--method", method, *FEW, "--dry_run")).out
    plan = yaml.safe_load(shown)
    assert plan["recipe"]["name"] == method
    assert (plan["recipe"]["weights"]["bits"], plan["recipe"]["activations"]["bits"]) == (4, 8)
    assert plan["recipe"]["selector"]["steps"] == plan["recipe"]["selector"]["per_step"] == 2
    Path("plan.yml").write_text(shown)
    assert passed(call(*lines[script], "--ptq", "--recipe", "plan.yml", "--dry_run")).out == shown
    assert sorted(tree(tmp_path)) == ["plan.yml"]


def test_a_printed_plan_given_back_makes_the_same_images(runs, tmp_path):
    """And the same checkpoint, of a run whose groups do not divide its steps."""
    found = runs("sample_diffusion_ddim", "accuquant")
    shown = passed(call(*found.line, *W4A8, "--method", "accuquant", *FEW, "--dry_run")).out
    (tmp_path / "plan.yml").write_text(shown)
    again = run(found.line, tmp_path / "out", "--ptq", "--recipe", "plan.yml")
    assert again.images == found.images and again.checkpoint.read_bytes() == found.checkpoint.read_bytes()


# The last of several equal flags counts
OTHER_STEPS = {
    "sample_diffusion_ddim": ("--timesteps", 4),
    "sample_diffusion_ldm": ("-c", 4),
    "txt2img": ("--ddim_steps", 4),
}


@pytest.mark.parametrize(("script", "method"), EACH)
def test_sets_for_another_sampler_are_used_with_one_warning(runs, tmp_path, script, method):
    found = runs(script, method)
    flags = (*OTHER_STEPS[script], "--ptq", "--quant_act", "--cali_ckpt", found.checkpoint)
    other = run(found.line, tmp_path / "out", *flags)
    assert len(other.images) == 1 and other.images != found.images
    log = (other.folder / "run.log").read_text()
    if method in ("quest", "accuquant"):
        [line] = other.result.complaints
        assert "2 parameter sets for a sampler of 8 timesteps, this one has 4" in line
        assert log.count(" WARNING ") == 1 and line.split(" WARNING ")[1] in log
    else:
        assert other.result.complaints == [] and " WARNING " not in log


@pytest.mark.parametrize("method", ["quest", "accuquant"])
def test_float_activations_need_nothing_per_step(lines, tmp_path, method):
    """Weights alone, learned by methods that have sets per step, and sampled with another number of steps."""
    line = (*lines["sample_diffusion_ddim"], "--timesteps", 4)
    found = run(line, tmp_path / "out", "--ptq", "--weight_bit", 4, "--method", method, *FEW)
    loaded = load_checkpoint(found.checkpoint)
    assert loaded.recipe.activations is None and not act_quantizers(loaded.network)
    other = run((*line, "--timesteps", 2), tmp_path / "other", "--ptq", "--cali_ckpt", found.checkpoint)
    assert other.result.complaints == []


def test_given_weights_and_groups_of_one_step(runs, lines, tmp_path):
    """--resume_w with one method's weights and another's activations; fields that no flag has, by --set."""
    given = runs("sample_diffusion_ddim", "q-diffusion")
    codes = {name: layer.codes for name, layer in quant_layers(load_checkpoint(given.checkpoint).network).items()}
    line = (*lines["sample_diffusion_ddim"], "--timesteps", 4)
    flags = (*W4A8, "--method", "accuquant", *FEW, "--cali_ckpt", given.checkpoint, "--resume_w")
    fields = ("step_groups.size=1", "rollout.gradient=exact", "rollout.samples=1")
    found = load_checkpoint(run(line, tmp_path / "out", *flags, "--set", *fields).checkpoint)
    layers = quant_layers(found.network)
    assert found.recipe.name == "accuquant" and layers.keys() == codes.keys()
    assert all(torch.equal(layers[name].codes, codes[name]) for name in codes)
    assert {len(quantizer.scale) for quantizer in act_quantizers(found.network).values()} == {4}
    assert (found.recipe.stages[-1].gradient, found.recipe.stages[-1].samples) == ("exact", 1)
