"""The LSUN and Stable Diffusion command lines of the Q-Diffusion repository, as they stand, from its root's layout.

Only the models in their places are tiny and the work short. Added to each: fewer images (and --n_iter); to the
calibrating ones also --cali_iters and --cali_iters_a, and a smaller --cali_n.
"""

import shlex
import shutil

import pytest
import torch
from latents import TinyModel, images
from running import call, launch, only_run, passed

from qdiff.checkpoints.native import load_checkpoint

LDM, SD = "sample_diffusion_ldm", "txt2img"
BEDS = (
    "-r models/ldm/lsun_beds256/model.ckpt -n 20 --batch_size 10 -c 200 -e 1.0 --seed 41 --ptq --weight_bit {bits} "
    "{activations} {resume} -l {out} --cali_ckpt {ckpt}"
)
BEDS_CALIBRATING = (
    "-r models/ldm/lsun_beds256/model.ckpt -n 20 --batch_size 10 -c 200 -e 1.0 --seed 41 --ptq --weight_bit {bits} "
    "--quant_mode qdiff --cali_st 20 --cali_batch_size 32 --cali_n 256 --quant_act --act_bit 8 --a_sym --a_min_max "
    "--running_stat --cali_data_path {data} -l {out}"
)
CHURCHES = (
    "-r models/ldm/lsun_churches256/model.ckpt -n 20 --batch_size 10 -c 400 -e 0.0 --seed 41 --ptq "
    "--weight_bit {bits} {activations} {resume} -l {out} --cali_ckpt {ckpt}"
)
CHURCHES_CALIBRATING = (  # not published; without learning, which the others show
    "-r models/ldm/lsun_churches256/model.ckpt -n 20 --batch_size 10 -c 400 -e 0.0 --seed 41 --ptq "
    "--weight_bit {bits} --method nearest --cali_st 20 --quant_act --act_bit 8 --cali_data_path {data} -l {out}"
)
TXT2IMG = (
    '--prompt "a puppy wearing a hat" --plms --cond --ptq --weight_bit {bits} --quant_mode qdiff --no_grad_ckpt '
    "--split --n_samples 5 {resume} {activations} --outdir {out} --cali_ckpt {ckpt}"
)
TXT2IMG_CALIBRATING = (
    '--prompt "a puppy wearing a hat" --plms --cond --ptq --weight_bit {bits} --quant_mode qdiff --no_grad_ckpt '
    "--split --n_samples 5 --quant_act --act_bit 8 --cali_st 25 --cali_batch_size 8 --cali_n 128 --no_grad_ckpt "
    "--split --running_stat --sm_abit 16 --cali_data_path {data} --outdir {out}"
)
FEW = {LDM: ["-n", "1"], SD: ["--n_samples", "1", "--n_iter", "1"]}
QUICKLY = ["--cali_n", "1", "--cali_iters", "1", "--cali_iters_a", "1"]
FAMILIES = {  # script, the line that samples, the one that calibrates, what is added for activations
    "bedrooms": (LDM, BEDS, BEDS_CALIBRATING, "--quant_act --act_bit 8 --a_sym"),
    "churches": (LDM, CHURCHES, CHURCHES_CALIBRATING, "--quant_act --act_bit 8"),
    "stable-diffusion": (SD, TXT2IMG, TXT2IMG_CALIBRATING, "--quant_act --act_bit 8 --sm_abit 16"),
}


def put(model: TinyModel, folder, config):
    """A model's checkpoint, with what lies beside it, and its configuration where it is published."""
    shutil.copytree(model.folder, folder)
    (folder / "config.yaml").rename(folder / "moved.yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    (folder / "moved.yaml").rename(config)


@pytest.fixture(scope="module")
def root(latent, tmp_path_factory):
    """A folder laid out as the repository, with data in the original's format."""
    root = tmp_path_factory.mktemp("root")
    for name in ("lsun_beds256", "lsun_churches256"):
        folder = root / "models" / "ldm" / name
        put(latent.ldm, folder, folder / "config.yaml")
    folder = root / "models" / "ldm" / "stable-diffusion-v1"
    put(latent.sd, folder, root / "configs" / "stable-diffusion" / "v1-inference.yaml")
    draws = torch.Generator().manual_seed(0)
    for name, channels in {"unconditional": 3, "conditional": 4}.items():
        steps = range(981, 0, -20)
        data = {"xs": [torch.randn(2, channels, 8, 8, generator=draws) for _ in steps]}
        data |= {"ts": [torch.full((2,), step) for step in steps]}
        if name == "conditional":
            data |= {key: [torch.randn(2, 16, 32, generator=draws)] * len(steps) for key in ("cs", "ucs")}
        torch.save(data, root / f"{name}.pt")
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, root):
    """(family, folder of the calibrating line's run)"""
    script, _, template, _ = FAMILIES[request.param]
    out = root / request.param
    data = root / ("conditional.pt" if script == SD else "unconditional.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        passed(call(script, *shlex.split(template.format(bits=4, data=data, out=out)), *FEW[script], *QUICKLY))
    return request.param, only(out)


def only(out):
    return only_run(out) if (out / "samples").is_dir() else next(out.iterdir())


def pictures(run):
    return images(run, "img" if (run / "img").is_dir() else "samples")


def sampled(root, made, tmp_path, monkeypatch, activations, resume):
    script, template, _, with_activations = FAMILIES[made[0]]
    flags = with_activations if activations else ""
    values = {"bits": 4, "activations": flags, "resume": resume, "out": tmp_path / "out", "ckpt": made[1] / "ckpt.pth"}
    monkeypatch.chdir(root)
    result = passed(call(script, *shlex.split(template.format(**values)), *FEW[script]))
    return result, pictures(only(tmp_path / "out"))


@pytest.mark.cases("bedrooms", "stable-diffusion")
def test_the_calibrating_line(made):
    family, run = made
    recipe = load_checkpoint(run / "ckpt.safetensors").recipe
    assert recipe.name == ("nearest" if family == "churches" else "q-diffusion")
    assert (recipe.weights.bits, recipe.activations.bits) == (4, 8)
    symmetric, split, steps = family == "bedrooms", family == "stable-diffusion", 25 if family[0] == "s" else 20
    assert (recipe.activations.kind == "signed", recipe.split_shortcuts) == (symmetric, split)
    assert (recipe.selector.steps, recipe.softmax.bits) == (steps, 16 if family == "stable-diffusion" else 8)
    assert len(pictures(run)) == 1 and (run / "ckpt.pth").is_file()


@pytest.mark.cases("bedrooms", "stable-diffusion")
def test_with_activations(root, made, tmp_path, monkeypatch):
    """Older copies of the lines have no --resume."""
    result, found = sampled(root, made, tmp_path, monkeypatch, activations=True, resume="")
    assert "W4A8" in result.out and found == pictures(made[1])


@pytest.mark.parametrize("made", ["bedrooms", "stable-diffusion"], indirect=True)
@pytest.mark.cases("bedrooms")
def test_weights_only(root, made, tmp_path, monkeypatch):
    result, found = sampled(root, made, tmp_path, monkeypatch, activations=False, resume="--resume")
    assert "W4A32" in result.out and found != pictures(made[1])


@pytest.mark.long
def test_eight_bits_of_a_file_that_the_original_wrote(root, tmp_path, monkeypatch):
    """Nothing in it but the original's tensors."""
    monkeypatch.chdir(root)
    flags = ("--weight_bit", 8, "--quant_act", "--method", "nearest", "--cali_st", 2, "--cali_n", 2, "--split")
    model = ("--prompt", "a puppy", "--plms", "--ptq", "--sm_abit", 16, *FEW[SD])
    passed(call(SD, *model, *flags, "--cali_data_path", "conditional.pt", "--outdir", tmp_path / "made"))
    run = only(tmp_path / "made")
    torch.save(dict(torch.load(run / "ckpt.pth", weights_only=True)), tmp_path / "original.pth")
    values = {"bits": 8, "activations": FAMILIES["stable-diffusion"][3], "resume": "--resume"}
    text = TXT2IMG.format(**values, out=tmp_path / "out", ckpt=tmp_path / "original.pth")
    result = passed(call(SD, *shlex.split(text.replace("a puppy wearing a hat", "a puppy")), *FEW[SD]))
    assert "W8A8" in result.out and pictures(only(tmp_path / "out")) == pictures(run)


@pytest.mark.parametrize("made", ["stable-diffusion"], indirect=True)
@pytest.mark.long
def test_in_a_process_of_its_own(root, made):
    """With relative paths, as people type them."""
    script, template, _, activations = FAMILIES[made[0]]
    (root / "w.pth").write_bytes((made[1] / "ckpt.pth").read_bytes())
    text = template.format(bits=4, activations=activations, resume="", out="again", ckpt="w.pth")
    passed(launch(script, *shlex.split(text), *FEW[script], cwd=root))
    assert pictures(only(root / "again")) == pictures(made[1])
