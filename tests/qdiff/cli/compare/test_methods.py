"""compare_methods.py: one table, pictures, one checkpoint per entry; parts that are done stay done."""

import json

import pytest
import torch
import yaml
from comparing import in_this_process, rows_of, run_jobs
from PIL import Image
from running import call, passed, refused, tree
from safetensors.torch import load_file

from ddim.samplers import ddim_step
from ddim.schedules import beta_schedule, cumulative_alphas
from qdiff.checkpoints.native import load_checkpoint
from qdiff.cli.compare import command as compare_methods
from qdiff.cli.compare import parts as comparison_parts
from qdiff.cli.compare import report as comparison_report
from qdiff.evaluation.curves import error_curves
from qdiff.evaluation.fidelity import feature_statistics, frechet_distance
from qdiff.evaluation.similarity import to_uint8
from qdiff.evaluation.table import FD_NAME
from qdiff.utils.devices import device_name
from qdiff.utils.files import sole_user

COMPARE = "compare_methods"
# Four steps of four images, which is what the float sampling states are for too.
SHORT = ("--timesteps", 4, "--cali_st", 2, "--cali_n", 2, "--n_samples", 4)
METHODS = ("--methods", "nearest", "quick:2", "--weight_bit", 8, 4, "--a_sym", "--split")
NAMES = [f"{method}_w{bits}a8" for bits in (8, 4) for method in ("nearest", "quick-2")]
KEYS = {"method", "weight_bits", "act_bits", "psnr_db", "fd", "fd_float", "bytes"}
ERRORS = {"accumulated", "single_step"}


@pytest.fixture(scope="module")
def compared(tiny32, tmp_path_factory):
    """The Result and the output folder of a comparison, with its pictures."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_methods, "run_jobs", run_jobs)
        return passed(call(COMPARE, *tiny32.model, *SHORT, *METHODS, "--outdir", folder)), folder


@pytest.fixture
def inline(monkeypatch):
    """Parts run in this process."""
    in_this_process(monkeypatch)


def test_what_it_writes(compared):
    result, out = compared
    top = [path for path in tree(out) if "/" not in path]
    written = ["comparison.png", "comparison.yaml", "errors.png", "results.json", "results.md", "float", *NAMES]
    assert sorted(top) == sorted([*written, *(f"{name}.safetensors" for name in NAMES)])
    for name in NAMES:
        assert {path.name for path in (out / name).iterdir()} >= {"result.json", "images.safetensors", "run.log"}
        assert not list((out / name).glob("batch_*"))
    table = (out / "results.md").read_text()
    device = device_name(torch.device("cpu"))
    assert table in result.out and f"out/comparison.png, on {device}" in result.out
    assert len(table.splitlines()) == 2 + 5 and "| 4/8 " in table
    assert (out / "run.log").is_file() and f"| {FD_NAME} |" in table
    assert {"calibration data", "float images", "nearest images", "weight ranges"} <= set(result.bars)


def test_the_results(compared):
    results = json.loads((compared[1] / "results.json").read_text())
    assert results.keys() == {"seconds", "rows", "timesteps"} and results["seconds"] > 0
    rows = results["rows"]
    assert [(row["method"], row["weight_bits"]) for row in rows] == [
        ("float", 32),
        *((method, bits) for bits in (8, 4) for method in ("nearest", "quick")),
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert isinstance(row["fd"], float) and row["fd"] > 0 and isinstance(row["bytes"], int)
        assert (row["psnr_db"] is None) == (row["fd_float"] is None) == (row["method"] == "float")
        assert row["peak_memory_bytes"]["host"] > 2**26
    assert {row["act_bits"] for row in rows} == {8, 32}
    psnr = {(row["method"], row["weight_bits"]): row["psnr_db"] for row in rows}
    assert all(psnr[method, 8] > psnr[method, 4] for method in ("nearest", "quick"))


def test_measures_are_those_of_the_images(compared):
    out = compared[1]
    images = {name: load_file(out / name / "images.safetensors")["images"] for name in ("float", *NAMES)}
    for name, row in zip(NAMES, rows_of(out)[1:], strict=True):
        error = (images[name].double() - images["float"].double()).square().mean()
        assert row["psnr_db"] == pytest.approx(-10 * error.log10().item(), abs=1e-3)
        first, second = (feature_statistics(to_uint8(images[key])) for key in (name, "float"))
        assert row["fd_float"] == pytest.approx(frechet_distance(first, second), abs=1e-4)


def test_errors_along_the_steps(compared):
    """The same noise to begin with; the first step is alone with its error; the end is that of the images' x."""
    out = compared[1]
    for row in rows_of(out)[1:]:
        assert len(row["accumulated"]) == 5 and len(row["single_step"]) == 4
        assert row["accumulated"][0] == 0
        assert row["accumulated"][1] == pytest.approx(row["single_step"][0], rel=1e-3)
        assert min(row["single_step"]) > 0
    assert json.loads((out / "results.json").read_text())["timesteps"] == [800, 355, 88, 0]


def test_errors_of_single_steps(compared):
    """Against a step made twice from each float state, with either prediction."""
    out, squares = compared[1], torch.zeros(4, dtype=torch.float64)
    network = load_checkpoint(out / "nearest_w4a8.safetensors").network
    alphas = cumulative_alphas(beta_schedule("linear", 0.0001, 0.02, 1000))
    for path in sorted((out / "float").glob("batch_*")):
        state = load_file(path)
        for step, (x, t, eps) in enumerate(zip(state["x"], state["t"], state["eps"], strict=True)):
            following = alphas[int(state["t"][step + 1, 0])] if step < 3 else torch.tensor(1.0)
            with torch.no_grad():
                answers = (network(x, t), eps)
            a, b = (ddim_step(x.double(), answer.double(), alphas[int(t[0])], following) for answer in answers)
            squares[step] += (a - b).square().mean() / 2  # of two batches
    row = rows_of(out)[3]
    assert (row["label"], row["weight_bits"]) == ("nearest", 4)
    torch.testing.assert_close(torch.tensor(row["single_step"]).double(), squares.sqrt(), rtol=1e-4, atol=0)


def test_the_sizes_are_those_of_the_files(compared):
    _, out = compared
    rows = rows_of(out)
    for name, row in zip(NAMES, rows[1:], strict=True):
        assert row["bytes"] == (out / f"{name}.safetensors").stat().st_size
        assert load_checkpoint(out / f"{name}.safetensors").recipe.weights.bits == row["weight_bits"]
    assert rows[3]["bytes"] < 0.35 * rows[0]["bytes"]


def test_the_pictures(compared):
    with Image.open(compared[1] / "comparison.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.height >= 5 * 96 and picture.width >= 4 * 96
    with Image.open(compared[1] / "errors.png") as picture:
        assert picture.format == "PNG" and picture.width == 1100


@pytest.mark.long
def test_the_same_comparison_gives_the_same_images(tiny32, compared, inline, tmp_path):
    """Part of it again, in this process: the same numbers and the same checkpoint."""
    flags = ("--methods", "quick:2", "--a_sym", "--split", "--n_errors", 2)
    passed(call(COMPARE, *tiny32.model, *SHORT, *flags, "--outdir", tmp_path))
    (row, other) = (rows_of(tmp_path)[1], rows_of(compared[1])[4])
    assert {key: row[key] for key in KEYS} == {key: other[key] for key in KEYS}
    assert row["accumulated"] != other["accumulated"]  # of fewer images
    name = "quick-2_w4a8.safetensors"
    assert (tmp_path / name).read_bytes() == (compared[1] / name).read_bytes()


def test_a_finished_comparison_just_prints_its_table(tiny32, compared, monkeypatch):
    out, started = compared[1], []
    monkeypatch.setattr(compare_methods, "run_jobs", lambda todo, *rest, **more: started.extend(todo))
    before = tree(out)
    result = passed(call(COMPARE, *tiny32.model, *SHORT, *METHODS, "--outdir", out))
    assert (out / "results.md").read_text() in result.out and started == [] and tree(out) == before


def test_two_comparisons_do_not_share_a_folder(tiny, tmp_path):
    with sole_user(tmp_path):
        refused(call(COMPARE, *tiny.model, *SHORT, "--outdir", tmp_path), str(tmp_path), "another process")


def test_rounding_may_start_from_compensated_weights(tiny, tmp_path):
    flags = ("--methods", "q-diffusion:3", "eda-dm:3", "--rounding_start", "gptq", "--dry_run", "--outdir", tmp_path)
    plan = yaml.safe_load(passed(call(COMPARE, *tiny.model, *SHORT, *flags)).out)
    for recipe in plan["runs"].values():
        names = [stage["stage"] for stage in recipe["stages"]]
        assert names.index("compensate") < names.index("reconstruct")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--n_samples", 5), ("n_samples: 4 there, 5 here",)),
        (("--seed", 5), ("seed: 1234 there, 5 here",)),
        (("--set", "quick:reconstruct.iterations=3"), ("quick-2_w4a8", "iterations: 2 there, 3 here")),
    ],
)
def test_a_comparison_of_another_plan_is_refused(tiny32, compared, flags, names):
    before = tree(compared[1])
    result = call(COMPARE, *tiny32.model, *SHORT, *METHODS, *flags, "--outdir", compared[1])
    refused(result, "comparison.yaml", *names, "--outdir")
    assert tree(compared[1]) == before


def test_entries_and_seeds_are_added(tiny, inline, tmp_path):
    """To a finished comparison: what is there is kept, float states for more seeds come beside those there are."""
    flags = (*tiny.model, *SHORT, "--outdir", "out")
    passed(call(COMPARE, *flags, "--methods", "nearest"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(list((tmp_path / "out" / "float").glob("shard_*"))) == 1
    passed(call(COMPARE, *flags, "--methods", "nearest", "gptq", "--set", "gptq:selector.per_step=3"))
    assert len(list((tmp_path / "out" / "float").glob("shard_*"))) == 2
    same = {path for path, changed in kept.items() if path.stat().st_mtime_ns == changed}
    assert kept.keys() - same == {tmp_path / "out" / "float" / "images.safetensors"}
    assert list(yaml.safe_load((tmp_path / "out" / "comparison.yaml").read_text())["runs"]) == [
        "nearest_w4a8",
        "gptq_w4a8",
    ]
    assert [row["label"] for row in rows_of(tmp_path / "out")] == ["float", "nearest", "gptq"]


def test_recipes_from_files(tiny, inline, tmp_path):
    """A method's own recipe from a file does what the method does."""
    flags = (*tiny.model, *SHORT, "--methods", "nearest")
    plan = yaml.safe_load(passed(call(COMPARE, *flags, "--dry_run")).out)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plan["runs"]["nearest_w4a8"]))
    passed(call(COMPARE, *flags, "--recipe", "mine.yaml", "--act_bit", 8, 32, "--outdir", "out"))
    rows = {(row["label"], row["act_bits"]): row for row in rows_of(tmp_path / "out")}
    assert rows.keys() == {("float", 32), ("nearest", 8), ("nearest", 32), ("mine", 8)}
    assert [rows[label, 8]["psnr_db"] for label in ("mine",)] == [rows["nearest", 8]["psnr_db"]]
    assert rows["mine", 8]["accumulated"] == rows["nearest", 8]["accumulated"]


def test_weights_alone_and_images_of_another_size(tiny, inline, tmp_path):
    """32 stands for float activations; the Fréchet distance is of 32-pixel images only."""
    flags = ("--methods", "nearest", "--act_bit", 32, "--outdir", tmp_path)
    result = passed(call(COMPARE, *tiny.model, *SHORT, *flags))
    rows = rows_of(tmp_path)
    assert [(row["act_bits"], row["fd"], row["fd_float"]) for row in rows] == [(32, None, None)] * 2 + rows[2:]
    assert load_checkpoint(tmp_path / "nearest_w4a32.safetensors").recipe.activations is None
    assert "FD" not in result.out


def test_a_sampler_that_clips(tiny, inline, monkeypatch, tmp_path):
    """It has no fixed path of errors, so nothing is said of single steps."""
    monkeypatch.setattr(comparison_report, "error_curves", error_curves)
    flags = ("--methods", "nearest", "--sample_type", "ddpm_noisy", "--outdir", tmp_path)
    passed(call(COMPARE, *tiny.model, *SHORT, *flags))
    row = rows_of(tmp_path)[1]
    assert row["single_step"] is None and len(row["accumulated"]) == 5 and (tmp_path / "errors.png").is_file()


def test_activations_per_channel_are_marked(tiny, inline, tmp_path):
    flags = ("--methods", "nearest", "--set", "activations.axis=in_channel", "--outdir", tmp_path)
    result = passed(call(COMPARE, *tiny.model, *SHORT, *flags))
    assert "| 4/8 (per channel) |" in result.out and rows_of(tmp_path)[1]["per_channel"]


def test_a_dry_run_prints_every_recipe_and_writes_nothing(tiny, tmp_path):
    flags = ("--methods", "quick:3", "nearest", "--dry_run", "--outdir", "out")
    plan = yaml.safe_load(passed(call(COMPARE, *tiny.model, *SHORT, *flags)).out)
    assert list(plan["runs"]) == ["quick-3_w4a8", "nearest_w4a8"] and tree(tmp_path) == {}
    stages = {stage["stage"]: stage for stage in plan["runs"]["quick-3_w4a8"]["stages"]}
    assert stages["reconstruct"]["iterations"] == 3


def test_overrides(tiny):
    flags = ("--methods", "quick", "nearest", "--set", "selector.steps=3", "quick:reconstruct.iterations=7")
    runs = yaml.safe_load(passed(call(COMPARE, *tiny.model, *SHORT, *flags, "--dry_run")).out)["runs"]
    assert [run["selector"]["steps"] for run in runs.values()] == [3, 3]
    stages = {stage["stage"]: stage for stage in runs["quick_w4a8"]["stages"]}
    assert stages["reconstruct"]["iterations"] == 7


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of the comparison that is interrupted below, of one that is not."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        passed(call(COMPARE, *tiny.model, *SHORT, "--methods", "nearest", "--outdir", folder))
    return folder


@pytest.mark.parametrize("function", ["calibrate_network", "sample_entry", "root_mean_squares"])
@pytest.mark.cases("calibrate_network", "root_mean_squares")
def test_an_interrupted_entry_goes_on(tiny, inline, whole, monkeypatch, tmp_path, function):
    """To the same result as one that was not interrupted, without a second calibration once that is done."""
    original, made = getattr(comparison_parts, function), []
    calibrations = []

    def once(*args, **kwargs):
        made.append(function)
        found = original(*args, **kwargs)
        if len(made) == 1:
            raise KeyboardInterrupt
        return found

    flags = (*tiny.model, *SHORT, "--methods", "nearest")
    monkeypatch.setattr(comparison_parts, function, once)
    assert call(COMPARE, *flags, "--outdir", "out").code == 130
    calibrate = comparison_parts.calibrate_network
    monkeypatch.setattr(
        comparison_parts, "calibrate_network", lambda *a, **k: calibrations.append(1) or calibrate(*a, **k)
    )
    passed(call(COMPARE, *flags, "--outdir", "out"))
    assert len(calibrations) == (function == "calibrate_network")
    (row, other) = (rows_of(folder)[1] for folder in (tmp_path / "out", whole))
    assert {key: row[key] for key in KEYS | ERRORS} == {key: other[key] for key in KEYS | ERRORS}
    for name in ("nearest_w4a8.safetensors", "nearest_w4a8/images.safetensors", "comparison.png"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(tree(tmp_path / "out")) == sorted(tree(whole))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--methods", "magic"), ("--methods magic", "nearest", "q-diffusion")),
        (("--methods", "quick:0"), ("--methods quick:0", "METHOD:ITERATIONS")),
        (("--methods", "quick:many"), ("--methods quick:many",)),
        (("--methods", "nearest", "quick:"), ("--methods quick:",)),
        (("--methods",), ("--methods",)),
        (("--weight_bit", 4, 1), ("--weight_bit", "'1'")),
        (("--act_bit", 16), ("--act_bit 16", "32 for float")),
        (("--act_bit", 8, 16), ("--act_bit 16", "32 for float")),
        (("--sm_abit", 17), ("--sm_abit", "'17'")),
        (("--n_samples", 1), ("--n_samples", "at least 2")),
        (("--cali_n", 0), ("--cali_n", "at least 1")),
        (("--cali_st", 5), ("--cali_st 5", "4 steps")),
        (("--timesteps", 2000), ("--timesteps 2000",)),
        (("--device", "nonsense"), ("--device nonsense",)),
        (("--ckpt", "nope.pt"), ("nope.pt",)),
        (("--outdir", "a-file/out"), ("a-file/out",)),
        (("--jobs", 0), ("--jobs", "'0'")),
        (("--only", "gptq_w2a2"), ("--only gptq_w2a2", "nearest_w4a8")),
        (("--prompt", "a cat"), ("--prompt", "latent models only")),
        (("--recipe", "nope.yaml"), ("--recipe nope.yaml",)),
        (("--recipe", "a-file"), ("a-file",)),
        (("--set", "selector.steps=0"), ("nearest", "selector")),
        (("--set", "reconstruct.iterations=5"), ("nearest", "reconstruct.iterations", "weight_ranges")),
        (("--set", "magic:selector.steps=2"), ("--set magic:selector.steps=2", "nearest, gptq, quick")),
        (("--set", "selector.steps"), ("PATH=VALUE",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") and len(value) < 4 else "",
)
def test_bad_input(tiny, tmp_path, flags, names):
    (tmp_path / "a-file").touch()
    result = call(COMPARE, *tiny.model, *SHORT, "--outdir", "out", *flags)
    refused(result, *names)
    assert result.bars == [] and tree(tmp_path) == {"a-file": b""}
