"""txt2img.py: what it writes, prompts and their order, samplers and guidance, sizes, grids, calibrated networks."""

import re

import pytest
import torch
import yaml
from latents import TXT2IMG, all_pixels, as_safetensors, assert_close, images, pixels, txt2img
from running import call, passed, refused, tree

from qdiff.checkpoints.native import load_checkpoint
from qdiff.nn.layers import quant_layers

CAT = ("--prompt", "a photo of a cat")
NAMES = [f"{i:05d}.png" for i in range(4)]
FILES = ["grid-0000.png", "prompts.txt", "samples", *(f"samples/{name}" for name in NAMES), "sampling_config.yaml"]
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--sm_abit", 16, "--split", "--no_grad_ckpt")
NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 2)


@pytest.fixture(scope="module")
def plain(latent, tmp_path_factory):
    """The float model's run: two batches of a cat."""
    return txt2img(latent.sd, tmp_path_factory.mktemp("plain") / "out", *CAT)


@pytest.fixture(scope="module")
def calibrated(latent, tmp_path_factory):
    """A PLMS run that calibrates W4A8 with 16 bits of softmax outputs, without learning."""
    return txt2img(latent.sd, tmp_path_factory.mktemp("calibrated") / "out", *CAT, "--plms", *W4A8, *NEAREST)


def one(latent, folder, *flags):
    """The pixels of a single image."""
    (image,) = all_pixels(txt2img(latent.sd, folder, "--n_samples", 1, "--n_iter", 1, *flags))
    return image


# The float model


def test_what_is_written(latent, plain, tmp_path):
    """In a process of its own, from another folder, and by the model's folder: the same bytes."""
    flags = ("--ckpt", latent.sd.folder, *TXT2IMG, *CAT)
    result = passed(call("txt2img", *flags, "--outdir", "out"))
    (run,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"\d{4}(-\d\d){5}", run.name) and result.bars == ["sampling"]
    where = f"out/{run.name}"
    assert result.out == f"4 images of the float model in {where}/samples\n{where}/grid-0000.png\n"
    assert sorted(tree(run)) == FILES and tree(run) == tree(plain)
    assert all(image.shape == (16, 16, 3) and image.float().std() > 10 for image in all_pixels(run))
    assert len(set(images(run).values())) == 4
    assert (run / "prompts.txt").read_text() == 4 * "a photo of a cat\n"


def test_the_grid_shows_the_images_in_their_order(latent, plain, tmp_path):
    """With 2 pixels between them, --n_rows or --n_samples of them in a row."""

    def assert_grid(run, columns):
        grid, found = pixels(run / "grid-0000.png"), all_pixels(run)
        rows = -(-len(found) // columns)
        assert grid.shape == (18 * rows + 2, 18 * columns + 2, 3)
        for i, image in enumerate(found):
            y, x = 18 * (i // columns) + 2, 18 * (i % columns) + 2
            assert torch.equal(grid[y : y + 16, x : x + 16], image)

    assert_grid(plain, 2)
    assert_grid(txt2img(latent.sd, tmp_path / "out", *CAT, "--n_rows", 3), 3)


def test_a_grid_holds_twenty_rows(latent, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.cli.sample.txt2img.GRID_ROWS", 2)
    run = txt2img(latent.sd, tmp_path / "out", *CAT, "--n_rows", 1)
    assert [path.name for path in sorted(run.glob("grid*"))] == ["grid-0000.png", "grid-0001.png"]
    for number, first in enumerate((0, 2)):
        grid = pixels(run / f"grid-{number:04d}.png")
        assert torch.equal(torch.cat([grid[2:18], grid[20:36]])[:, 2:18], torch.cat(all_pixels(run)[first : first + 2]))


def test_skip_grid_and_skip_save(latent, plain, tmp_path):
    run = txt2img(latent.sd, tmp_path / "images", *CAT, "--skip_grid")
    assert sorted(tree(run)) == FILES[1:] and images(run) == images(plain)
    run = txt2img(latent.sd, tmp_path / "grid", *CAT, "--skip_save")
    assert sorted(tree(run)) == [FILES[0], FILES[1], FILES[-1]]
    assert (run / "grid-0000.png").read_bytes() == (plain / "grid-0000.png").read_bytes()


def test_without_an_outdir_images_go_to_outputs(latent, tmp_path):
    passed(call("txt2img", "--ckpt", latent.sd.ckpt, *CAT, "--n_iter", 1, "--n_samples", 1, "--ddim_steps", 2))
    assert len(list((tmp_path / "outputs" / "txt2img-samples").glob("*/samples/00000.png"))) == 1


def test_a_safetensors_file_with_its_configuration_elsewhere(latent, plain, tmp_path):
    """The text encoder's folder is looked for beside the checkpoint."""
    folder = as_safetensors(latent.sd, tmp_path / "model")
    (folder / "config.yaml").rename(tmp_path / "mine.yaml")
    flags = ("--ckpt", folder / "model.safetensors", "--config", tmp_path / "mine.yaml", *TXT2IMG, *CAT)
    passed(call("txt2img", *flags, "--outdir", tmp_path / "out"))
    (run,) = (tmp_path / "out").iterdir()
    assert images(run) == images(plain)


# Prompts


def test_a_file_of_prompts_is_sampled_in_its_order_n_iter_times(latent, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\r\n  a photo of a dog \r\na ship\n\n\n", encoding="utf8")
    run = txt2img(latent.sd, tmp_path / "out", "--from-file", "prompts.txt")  # 6 images, batches of 2
    assert (run / "prompts.txt").read_text().splitlines() == ["a cat", "a photo of a dog", "a ship"] * 2
    found = all_pixels(run)
    assert len(found) == 6
    for prompt, indices in {"a cat": (0, 3), "a photo of a dog": (1, 4), "a ship": (2, 5)}.items():
        alone = txt2img(latent.sd, tmp_path / prompt, "--prompt", prompt, "--n_samples", 6, "--n_iter", 1)
        assert_close([found[i] for i in indices], [all_pixels(alone)[i] for i in indices])
    assert not torch.equal(found[0], found[3])


def test_without_a_prompt_the_originals_is_shown(latent, tmp_path):
    short = ("--n_samples", 1, "--n_iter", 1)
    run = txt2img(latent.sd, tmp_path / "out", *short)
    assert (run / "prompts.txt").read_text() == "a painting of a virus monster playing guitar\n"
    (tmp_path / "prompts.txt").write_text("a cat\n")
    run = txt2img(latent.sd, tmp_path / "file", *short, "--from-file", "prompts.txt")
    assert (run / "prompts.txt").read_text() == "a cat\n"


def test_the_prompt_changes_the_image(latent, tmp_path):
    prompts = ("a cat", "a dog", "A  CAT", "")
    found = [one(latent, tmp_path / f"{i}", "--prompt", prompt) for i, prompt in enumerate(prompts)]
    assert torch.equal(found[0], found[2])  # letter case and white space are the tokenizer's business
    assert all((found[i] != found[j]).any() for i, j in ((0, 1), (0, 3), (1, 3)))


def test_a_prompt_that_is_too_long_is_named(latent, tmp_path):
    prompt = "a photo of a cat " * 5
    flags = ("--ckpt", latent.sd.ckpt, "--prompt", prompt, "--n_samples", 1, "--n_iter", 2, "--ddim_steps", 2)
    result = call("txt2img", *flags, "--outdir", "out")
    assert result.code == 0
    (line,) = result.complaints  # once, though it is sampled twice
    assert prompt[:40] in line and "27 tokens" in line and "sees 16" in line


def test_any_script_is_text(latent, tmp_path):
    (tmp_path / "prompts.txt").write_text("猫の\u3000写真\nun château\u00a0!\n👩‍🚀\n", encoding="utf8")
    run = txt2img(latent.sd, tmp_path / "out", "--from-file", "prompts.txt", "--n_iter", 1, "--skip_grid")
    assert len(images(run)) == 3


# Samplers, guidance, noise


def test_images_depend_on_the_seed_and_not_on_their_number(latent, plain, tmp_path):
    expected = images(plain)
    found = images(txt2img(latent.sd, tmp_path / "one", *CAT, "--n_iter", 1))
    assert found == {name: expected[name] for name in NAMES[:2]}
    assert not set(images(txt2img(latent.sd, tmp_path / "seed", *CAT, "--seed", 5)).values()) & set(expected.values())


@pytest.mark.parametrize("eta", [0, 1])
def test_images_do_not_depend_on_the_batch_size_beyond_float_noise(latent, tmp_path, eta):
    runs = [
        txt2img(latent.sd, tmp_path / f"{size}", *CAT, "--n_samples", size, "--n_iter", 4 // size, "--ddim_eta", eta)
        for size in (1, 2, 4)
    ]
    for run in runs[1:]:
        assert_close(all_pixels(run), all_pixels(runs[0]))


def test_samplers(latent, plain, tmp_path):
    """Their images differ, and each is described."""
    samplers = {"plms": ("--plms",), "dpm_solver": ("--dpm",), "ddim": ("--ddim_eta", 1)}
    found = [all_pixels(plain)[0]]
    for name, flags in samplers.items():
        run = txt2img(latent.sd, tmp_path / name, *CAT, "--n_iter", 1, *flags)
        assert yaml.safe_load((run / "sampling_config.yaml").read_text())["sampler"] == name
        found.append(all_pixels(run)[0])
    assert all((found[i] != found[j]).any() for i in range(4) for j in range(i))


def test_guidance(latent, tmp_path):
    """Scale 0 is the empty prompt, scale 1 the prompt alone, and larger ones are something else."""
    found = {scale: one(latent, tmp_path / f"{scale}", *CAT, "--scale", scale) for scale in (0, 1, 3, 7.5)}
    empty = one(latent, tmp_path / "empty", "--prompt", "", "--scale", 1)
    assert_close([found[0]], [empty])
    assert torch.equal(found[7.5], one(latent, tmp_path / "default", *CAT))
    assert all((found[a] != found[b]).any() for a, b in ((0, 1), (1, 3), (3, 7.5)))


def test_fixed_code(latent, plain, tmp_path):
    """Every batch starts from the noise of the first; noise that DDIM draws later is still each image's own."""
    found = images(txt2img(latent.sd, tmp_path / "out", *CAT, "--fixed_code"))
    expected = images(plain)
    assert [found[NAMES[i]] for i in range(4)] == [expected[NAMES[i]] for i in (0, 1, 0, 1)]
    noisy = all_pixels(txt2img(latent.sd, tmp_path / "eta", *CAT, "--fixed_code", "--ddim_eta", 1))
    assert (noisy[0] != noisy[2]).any()
    short = ("--n_samples", 2, "--n_iter", 1, "--from-file", "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    found = all_pixels(txt2img(latent.sd, tmp_path / "file", "--fixed_code", *short))
    assert_close([found[0]], [found[2]])  # though the last batch is shorter


@pytest.mark.parametrize("flags", [("--precision", "full"), ("--cond",), ("--no_grad_ckpt",)])
def test_flags_that_change_nothing_here(latent, plain, tmp_path, flags):
    assert images(txt2img(latent.sd, tmp_path / "out", *CAT, *flags)) == images(plain)


# Sizes


@pytest.mark.parametrize(("height", "width"), [(32, 16), (8, 24)])
def test_images_need_not_be_square(latent, tmp_path, height, width):
    flags = ("--H", height, "--W", width, "--C", 4, "--f", 2)
    run = txt2img(latent.sd, tmp_path / "out", *CAT, *flags, "--n_iter", 1)
    assert [tuple(image.shape) for image in all_pixels(run)] == [(height, width, 3)] * 2
    assert pixels(run / "grid-0000.png").shape == (height + 4, 2 * width + 6, 3)
    found = yaml.safe_load((run / "sampling_config.yaml").read_text())
    assert found["latents"] == [4, height // 2, width // 2]


def test_another_size_is_calibrated_for_itself_and_loads(latent, tmp_path):
    flags = (*CAT, "--H", 24, "--W", 16, *W4A8)
    run = txt2img(latent.sd, tmp_path / "out", *flags, *NEAREST)
    loaded = txt2img(latent.sd, tmp_path / "loaded", *flags, "--cali_ckpt", run / "ckpt.safetensors")
    assert images(loaded) == images(run)


# Calibration


def test_a_calibrating_run(calibrated):
    assert sorted(tree(calibrated)) == ["ckpt.pth", "ckpt.safetensors", *FILES]
    found = yaml.safe_load((calibrated / "sampling_config.yaml").read_text())
    assert found["calibrated_on"]["first"] == ["a photo of a cat"] * 2 and found["recipe"]["softmax"]["bits"] == 16
    log = (calibrated / "run.log").read_text()
    assert "W4A8 model from" in log and "ckpt.pth with --weight_bit 4 --split --quant_act --act_bit 8" in log


def test_the_same_command_gives_the_same_bytes(latent, calibrated, tmp_path):
    assert tree(txt2img(latent.sd, tmp_path / "out", *CAT, "--plms", *W4A8, *NEAREST)) == tree(calibrated)


@pytest.mark.parametrize("flag", [(), ("--resume",)], ids=["implied", "--resume"])
@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.cases("ckpt.pth-implied", "ckpt.safetensors---resume")
def test_loading_gives_the_calibrating_runs_images(latent, calibrated, tmp_path, name, flag):
    run = txt2img(latent.sd, tmp_path / "out", *CAT, "--plms", *W4A8, "--cali_ckpt", calibrated / name, *flag)
    assert images(run) == images(calibrated) and sorted(tree(run)) == FILES


def test_resume_w_keeps_the_codes_and_calibrates_activations(latent, calibrated, tmp_path):
    flags = (*CAT, "--plms", *W4A8)
    given = ("--cali_ckpt", calibrated / "ckpt.pth", "--resume_w")
    run = txt2img(latent.sd, tmp_path / "out", *flags, *NEAREST, *given)
    mine, theirs = (quant_layers(load_checkpoint(r / "ckpt.safetensors").network) for r in (run, calibrated))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key].codes, theirs[key].codes) for key in mine)
    loaded = txt2img(latent.sd, tmp_path / "loaded", *flags, "--cali_ckpt", run / "ckpt.pth")
    assert images(loaded) == images(run)


def test_other_prompts_may_calibrate(latent, calibrated, tmp_path):
    """They change the network, not what is sampled."""
    (tmp_path / "other.txt").write_text("a dog\na ship\n")
    other = txt2img(latent.sd, tmp_path / "out", *CAT, "--plms", *W4A8, *NEAREST, "--cali_prompts", "other.txt")
    assert (calibrated / "ckpt.pth").read_bytes() != (other / "ckpt.pth").read_bytes()
    assert images(calibrated) != images(other)
    assert (other / "prompts.txt").read_bytes() == (calibrated / "prompts.txt").read_bytes()


def test_a_printed_recipe_given_back_gives_the_same_bytes(latent, calibrated, tmp_path):
    flags = ("--ckpt", latent.sd.ckpt, *TXT2IMG, *CAT, "--plms", "--no_grad_ckpt")
    plan = yaml.safe_load(passed(call("txt2img", *flags, *W4A8, *NEAREST, "--outdir", "out", "--dry_run")).out)
    assert tree(tmp_path) == {} and plan["folder"] == "out/<date-time>" and plan["images"] == 4
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(plan["recipe"]))
    recipe = ("--ptq", "--recipe", "recipe.yml", "--no_grad_ckpt")
    assert tree(txt2img(latent.sd, tmp_path / "out", *CAT, "--plms", *recipe)) == tree(calibrated)


def test_a_model_that_this_script_does_not_sample(latent, tmp_path):
    for model in (latent.ldm, latent.cin):
        line = refused(call("txt2img", "--ckpt", model.folder, *CAT), model.config, "text-to-image")
        assert "scripts/sample_diffusion_ldm.py" in line
    assert tree(tmp_path) == {}
