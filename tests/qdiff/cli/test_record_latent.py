"""make_calibration_data.py on latent models: conditioning, use by the sampling scripts, interrupted and continued."""

import pytest
import torch
from latents import images, sample_ldm, txt2img
from running import call, passed, refused, tree

from qdiff.calibration.trajectories import load_trajectories, original_layout, shard_path, shard_provenance
from qdiff.cli import record as make_calibration_data

MAKE = "make_calibration_data"
COMMON = ("--timesteps", 4, "--n_samples", 3, "--batch_size", 2)
NEAREST = ("--ptq", "--quant_act", "--method", "nearest", "--cali_st", 2, "--cali_n", 3)
SHARDS = [f"shard_{i:05d}.safetensors" for i in range(2)]


def flags_of(latent, name):
    """What names the model and asks it for samples, with the seed of the sampling script's runs."""
    asked = {"ldm": ("--seed", 41), "cin": ("--seed", 41, "--scale", 2), "sd": ("--seed", 42, "--prompt", "a cat")}
    return "-r", getattr(latent, name).folder, *COMMON, *asked[name]


@pytest.fixture(scope="module")
def data(latent, tmp_path_factory):
    """name -> (folder of shards, the original's file)"""
    out = tmp_path_factory.mktemp("data")
    for name in ("ldm", "cin", "sd"):
        for path in (out / name, out / f"{name}.pt"):
            passed(call(MAKE, *flags_of(latent, name), "--out", path))
    return {name: (out / name, out / f"{name}.pt") for name in ("ldm", "cin", "sd")}


def test_what_is_recorded(latent, data):
    shapes = {"ldm": (3, 8, 8), "cin": (3, 8, 8), "sd": (4, 8, 8)}
    for name, (shards, _) in data.items():
        assert sorted(tree(shards)) == SHARDS
        found = load_trajectories(shards, shapes[name])
        assert (found.steps, found.samples, found.timesteps.tolist()) == (4, 3, [751, 501, 251, 1])
        assert list(found.extra) == ([] if name == "ldm" else ["cs", "ucs"])
        about = shard_provenance(shard_path(shards, 0))
        assert about["source"] == "model.ckpt" and len(about["source_sha256"]) == 64 and about["sampler"] == "ddim"


def test_conditioning_is_what_the_encoders_say(latent, data):
    """Labels in turn, without the last one, which stands for none; every prompt's embedding is the same."""
    rows = latent.cin.state["cond_stage_model.embedding.weight"]
    classes, text = (load_trajectories(data[name][0]).extra for name in ("cin", "sd"))
    assert torch.equal(classes["cs"][0][:, 0], rows[:3]) and torch.equal(classes["ucs"][3][:, 0], rows[[4, 4, 4]])
    assert text["cs"][0].shape == (3, 16, 32) and torch.equal(text["cs"][0][0], text["cs"][3][2])
    assert not torch.equal(text["cs"][0], text["ucs"][0])


@pytest.mark.parametrize("name", ["ldm", "cin", "sd"])
def test_the_originals_file_holds_the_same(data, name):
    content, expected = torch.load(data[name][1], weights_only=True), original_layout(load_trajectories(data[name][0]))
    assert list(content) == list(expected) and all(torch.equal(content[key], expected[key]) for key in content)


@pytest.mark.parametrize("name", ["ldm", "cin", "sd"])
@pytest.mark.cases("cin")
def test_it_calibrates_as_states_that_the_run_makes_itself(latent, data, tmp_path, name):
    """With the same seed and batches: the same checkpoints and images, byte by byte."""
    model = getattr(latent, name)

    def run(out, *flags):
        if name == "sd":
            return txt2img(model, tmp_path / out, "--prompt", "a cat", *NEAREST, *flags)
        scale = ("--scale", 2) if name == "cin" else ()
        return sample_ldm(model, tmp_path / out, *scale, *NEAREST, *flags)

    where = "samples" if name == "sd" else "img"
    own, *others = (run("own"), *(run(f"{i}", "--cali_data_path", path) for i, path in enumerate(data[name])))
    for other in others:
        assert images(other, where) == images(own, where)
        assert (other / "ckpt.pth").read_bytes() == (own / "ckpt.pth").read_bytes()


def test_prompts_of_a_file_are_taken_in_turn(latent, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    line = ("-r", latent.sd.folder, *COMMON, "--from-file", "prompts.txt", "--scale", 1, "--H", 24, "--W", 8)
    passed(call(MAKE, *line, "--out", "data"))
    found = load_trajectories(tmp_path / "data", (4, 12, 4))
    assert list(found.extra) == ["cs"]  # without guidance there is no second half
    cs = found.extra["cs"][0]
    assert torch.equal(cs[0], cs[2]) and not torch.equal(cs[0], cs[1])


def test_chosen_classes(latent, tmp_path):
    passed(call(MAKE, "-r", latent.cin.ckpt, *COMMON, "--classes", "3", "0-1", "--out", "data"))
    rows = latent.cin.state["cond_stage_model.embedding.weight"]
    assert torch.equal(load_trajectories(tmp_path / "data").extra["cs"][0][:, 0], rows[[3, 0, 1]])


@pytest.mark.parametrize("sampler", ["plms", "dpm_solver", "ddpm"])
def test_samplers(latent, data, tmp_path, sampler):
    """One state per step, though PLMS calls the network twice in its first."""
    flags = ("--sample_type", sampler)
    if sampler == "ddpm":
        config = latent.ldm.config.read_text().replace("timesteps: 1000", "timesteps: 10")
        (tmp_path / "config.yaml").write_text(config)
        flags += ("--config", "config.yaml")
    passed(call(MAKE, *flags_of(latent, "ldm"), *flags, "--out", "data"))
    found = load_trajectories(tmp_path / "data", (3, 8, 8))
    assert found.steps == (10 if sampler == "ddpm" else 4)
    assert not torch.equal(found.xs[-1], load_trajectories(data["ldm"][0]).xs[-1])


@pytest.mark.parametrize("one_file", [False, True], ids=["shards", "file"])
def test_an_interrupted_recording_goes_on_where_it_stopped(latent, data, tmp_path, monkeypatch, one_file):
    made, save_shard = [], make_calibration_data.save_shard

    def save(part, path, provenance):
        if made:
            raise KeyboardInterrupt
        made.append(path.name)
        save_shard(part, path, provenance)

    line = (*flags_of(latent, "sd"), "--out", "data.pt" if one_file else "data")
    with monkeypatch.context() as patch:
        patch.setattr(make_calibration_data, "save_shard", save)
        assert call(MAKE, *line).code == 130
    assert made == SHARDS[:1]
    passed(call(MAKE, *line))
    expected = data["sd"][one_file]
    assert (
        tree(tmp_path) == {"data.pt": expected.read_bytes()} if one_file else tree(tmp_path / "data") == tree(expected)
    )


def test_other_settings_in_the_same_folder_are_refused(latent, data, tmp_path):
    changes = {("--prompt", "a dog"): "asked_for", ("--scale", 3): "scale 7.5"}
    passed(call(MAKE, *flags_of(latent, "sd"), "--out", "data"))
    before = tree(tmp_path)
    for flags, key in changes.items():
        refused(call(MAKE, *flags_of(latent, "sd"), *flags, "--out", "data"), SHARDS[0], f"made with {key}", "--out")
    assert tree(tmp_path) == before


WRONG_DATA = {  # data of another model, for which model, what is said of it
    ("cin", "ldm"): ("has conditioning", "takes none"),
    ("ldm", "cin"): ("expected calibration data with conditioning", "found none"),
    ("sd", "ldm"): ("(3, 8, 8)", "(4, 8, 8)"),
    ("ldm", "sd"): ("(4, 8, 8)", "(3, 8, 8)"),
}


@pytest.mark.parametrize(("made_by", "name"), WRONG_DATA)
def test_data_of_another_model_are_refused(latent, data, tmp_path, made_by, name):
    model, path = getattr(latent, name), data[made_by][0]
    line = ("txt2img", "--ckpt", model.ckpt, "--prompt", "a cat", "--ddim_steps", 4, "--outdir", "out")
    if name != "sd":
        line = ("sample_diffusion_ldm", "-r", model.ckpt, "--seed", 1, "-n", 1, "-c", 4, "-l", "out")
    refused(call(*line, *NEAREST, "--cali_data_path", path), path, *WRONG_DATA[made_by, name])
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("change", ["width", "labels"])
def test_conditioning_of_another_encoder_is_refused(latent, data, tmp_path, change):
    content = torch.load(data["sd"][1], weights_only=True)
    for key in ("cs", "ucs"):
        content[key] = torch.zeros(4, 3, 16, 48) if change == "width" else torch.zeros(4, 3)
    torch.save(content, "data.pt")
    line = ("txt2img", "--ckpt", latent.sd.ckpt, "--prompt", "a cat", "--ddim_steps", 4, "--outdir", "out", *NEAREST)
    found = "(3, 16, 48)" if change == "width" else "(3,)"
    refused(call(*line, "--cali_data_path", "data.pt"), "data.pt", "cs", "32", found)
    assert list(tree(tmp_path)) == ["data.pt"]


@pytest.mark.parametrize(
    ("name", "flags", "parts"),
    [
        (None, (), ("--config, -r", "name a pixel model")),
        ("ldm", ("--skip_type", "quad"), ("--skip_type", "pixel models only")),
        ("ldm", ("--use_pretrained",), ("--use_pretrained", "pixel models only")),
        ("ldm", ("--sample_type", "generalized"), ("--sample_type generalized", "ddim, plms, dpm_solver, ddpm")),
        ("ldm", ("--prompt", "a cat"), ("--prompt", "unconditional")),
        ("ldm", ("--scale", 2), ("--scale", "unconditional")),
        ("ldm", ("--classes", 1), ("--classes", "not class-conditional")),
        ("ldm", ("--timesteps", 2000), ("--timesteps 2000", "1..1000")),
        ("ldm", ("--H", 9), ("--H 9", "multiple of 2")),
        ("ldm", ("--sample_type", "plms", "--eta", 1), ("eta", "plms")),
        ("cin", ("--prompt", "a cat"), ("--prompt", "labels")),
        ("cin", ("--classes", 5), ("--classes 5", "0 to 4")),
        ("cin", ("--scale", 2, "--uncond_class", -1), ("--scale 2", "--uncond_class")),
        ("sd", (), ("--prompt, --from-file", "give one")),
        ("sd", ("--prompt", "a", "--from-file", "b"), ("--prompt, --from-file", "give one")),
        ("sd", ("--prompt", "a\nb"), ("--prompt", "U+000A")),
        ("sd", ("--from-file", "nope.txt"), ("--from-file nope.txt", "no such file")),
        ("sd", ("--prompt", "a", "--classes", 1), ("--classes", "not class-conditional")),
    ],
    ids=lambda value: (
        " ".join(map(repr, value)) if isinstance(value, tuple) and str(value[:1]).startswith("('--") else ""
    ),
)
def test_bad_input(latent, tmp_path, name, flags, parts):
    model = () if name is None else ("-r", getattr(latent, name).folder)
    refused(call(MAKE, *model, *COMMON, "--out", "data", *flags), *parts)
    assert tree(tmp_path) == {}


def test_flags_of_latent_models_on_a_pixel_model(tiny, tmp_path):
    for flag in ("--scale", "--prompt", "--from-file", "--classes", "--H"):
        refused(call(MAKE, *tiny.model, "--out", "data", flag, "1"), flag, "latent models only")
    assert tree(tmp_path) == {}
