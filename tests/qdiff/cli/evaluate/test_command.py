"""evaluate.py on images: torch-fidelity's numbers, what is computed offline, intervals, files, caches."""

import csv
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch_fidelity.fidelity
from judging import LABELS, PIXELS, evaluate, noisy, write_images, write_random_inception
from PIL import Image
from running import call, passed, refused
from torch_fidelity.registry import DATASETS_REGISTRY, FEATURE_EXTRACTORS_REGISTRY

from qdiff.evaluation.features import CLASSES, Cifar10FeatureExtractor
from qdiff.evaluation.fidelity import fd_cifar10, feature_statistics, frechet_distance
from qdiff.evaluation.perceptual import LPIPS_FILES, Cifar10Distance
from qdiff.evaluation.prompts import prompt_accuracy
from qdiff.evaluation.similarity import pooled_psnr_db, ssim


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test finds what another one kept, nor weights that lie on this machine."""
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """40 images, as many noisy ones of them, and 40 others."""
    folder = tmp_path_factory.mktemp("images")
    return (
        write_images(folder / "noisy", noisy(PIXELS[:40])),
        write_images(folder / "float", PIXELS[:40]),
        write_images(folder / "other", PIXELS[40:80]),
    )


OFFLINE = {"fd", "fd_float", "psnr", "psnr_mean", "ssim", "perceptual"}


def tensor(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@pytest.mark.long
def test_its_numbers_are_those_of_torch_fidelitys_command_line(tmp_path, monkeypatch, capsys):
    names = [f"{i}.png" for i in (2, 9, 10, 20)]  # not in torch-fidelity's order
    one = write_images(tmp_path / "one", noisy(PIXELS[:4], 30), names)
    two = write_images(tmp_path / "two", PIXELS[6:10], names)
    weights = write_random_inception(tmp_path / "inception.pth")
    inputs = ["--input1", one, "--input2", two, "--feature-extractor-weights-path", weights]
    asked = ["--isc", "--fid", "--kid", "--prc", "--feature-extractor", "inception-v3-compat", "--isc-splits", 2]
    options = ["--kid-subset-size", 4, "--kid-subsets", 7, "--cpu", "--json", "--no-cache", "--silent"]
    monkeypatch.setattr(sys, "argv", ["fidelity", *map(str, [*inputs, *asked, *options])])
    capsys.readouterr()
    torch_fidelity.fidelity.main()
    expected = json.loads(capsys.readouterr().out)
    metrics = ("--metrics", "fid", "is", "kid", "prc_inception", "--bootstrap", 0)
    flags = ("--kid_subset_size", 4, "--kid_subsets", 7, "--isc_splits", 2, "--inception", weights)
    flags += ("--cache", tmp_path / "cache")
    result = call("evaluate", one, "--reference", two, *metrics, *flags, "--json", tmp_path / "own.json")
    content = json.loads((tmp_path / "own.json").read_text())
    found = {row["metric"]: row["value"] for row in content["scores"]}
    assert found["fid"] == expected["frechet_inception_distance"]
    assert found["is"] == expected["inception_score_mean"]
    assert found["kid"] == expected["kernel_inception_distance_mean"]
    assert (found["precision_inception"], found["recall_inception"]) == (expected["precision"], expected["recall"])
    assert content["left_out"] == {str(one): {}} and content["weights"] == {"inception-v3-spatial": str(weights)}
    protocol, few = result.complaints
    assert "4 images; published FID, sFID and IS take 50000" in protocol
    assert "4 images, fewer than features: FID biased far upwards" in few
    # Once more from the cache: nothing of the reference is extracted, the number stays.
    again, same, _ = evaluate(tmp_path, one, "--reference", two, "--metrics", "kid", *flags)
    assert same["kid"] == pytest.approx(found["kid"], rel=1e-4)
    assert again.err.count("0/4 [") == 1 and result.err.count("0/4 [") == 2


def test_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = passed(call("evaluate", "--help")).out
    assert "(default: None)" not in text and "(default: False)" not in text and "(default: (" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"^ +--\w+( [A-Z_]+)?$\n(?! {10})", text, re.MULTILINE)  # a flag without a word about it


def test_offline_all_else_is_computed(tmp_path, folders):
    images, floats, _ = folders
    result, found, content = evaluate(tmp_path, images, "--float", floats)
    assert found.keys() == OFFLINE
    a, b = tensor(noisy(PIXELS[:40])), tensor(PIXELS[:40])
    assert found["fd"] == pytest.approx(fd_cifar10(a), abs=1e-6)
    assert found["fd_float"] == pytest.approx(frechet_distance(*map(feature_statistics, (a, b))), abs=1e-6)
    assert found["psnr"] == pytest.approx(pooled_psnr_db(a / 255, b / 255), rel=1e-6)
    assert found["ssim"] == pytest.approx(ssim(a, b).mean().item(), rel=1e-12)
    assert found["perceptual"] == pytest.approx(Cifar10Distance()(a, b).mean().item(), rel=1e-4)
    left_out = [line for line in result.out.splitlines() if line.startswith("left out")]
    assert "left out: fid, fid_float, sfid, is, kid, prc_inception: no Inception weights (--inception" in left_out[0]
    assert any(line.startswith("left out: prc: no VGG16 weights (--vgg") for line in left_out)
    assert any(line.startswith("left out: lpips: no LPIPS weights") for line in left_out)
    assert any(line.startswith("left out: clip, accuracy: no prompts") for line in left_out)
    assert len(left_out) == 5 and set(content["left_out"][str(images)]) == {
        *("fid", "fid_float", "sfid", "is", "kid", "prc", "prc_inception", "kid_cifar10", "prc_cifar10"),
        *("lpips", "clip", "accuracy"),
    }
    (line,) = result.complaints
    assert "40 images, fewer than features: FD (CIFAR-10 features)" in line


def test_an_npz_and_its_png_files_give_the_same(tmp_path, folders):
    images, floats, _ = folders
    names = [f"{i:06}.png" for i in range(40)]
    padded = write_images(tmp_path / "padded", noisy(PIXELS[:40]), names)
    np.savez(tmp_path / "images.npz", noisy(PIXELS[:40]))
    metrics = ("--metrics", "fd", "fd_float", "psnr", "ssim")
    values = [evaluate(tmp_path, path, "--float", floats, *metrics)[1] for path in (padded, tmp_path / "images.npz")]
    assert values[0] == values[1]
    assert evaluate(tmp_path, images, "--float", floats, *metrics)[1]["psnr"] == pytest.approx(values[0]["psnr"])


def test_a_reference_of_images_or_of_statistics(tmp_path, folders):
    images, _, other = folders
    metrics = ("--metrics", "fd", "kid_cifar10", "prc_cifar10", "--kid_subset_size", 20)
    _, found, content = evaluate(tmp_path, images, "--reference", other, *metrics)
    assert found.keys() == {"fd", "kid_cifar10", "precision_cifar10", "recall_cifar10"}
    statistics = feature_statistics(tensor(PIXELS[40:80]))
    np.savez(tmp_path / "reference.npz", mu=statistics.mu, sigma=statistics.sigma, n=40)
    result, again, _ = evaluate(tmp_path, images, "--reference", tmp_path / "reference.npz", *metrics)
    assert again["fd"] == pytest.approx(found["fd"], rel=1e-6) and again.keys() == {"fd"}
    assert "left out: kid_cifar10, prc_cifar10" in result.out and "reference.npz holds statistics" in result.out
    _, bundled, _ = evaluate(tmp_path, images, "--reference", "bundled", "--metrics", "fd")
    assert bundled["fd"] != again["fd"]
    assert content["sha256"].keys() == {str(images), "reference"}


@pytest.mark.parametrize(
    ("mu", "sigma", "found"),
    [((100,), (100, 100), "[100] and [100, 100]"), ((256, 1), (256, 256), "[256, 1]"), ((256,), (9, 9), "[9, 9]")],
)
def test_statistics_of_another_shape_are_refused(tmp_path, folders, mu, sigma, found):
    """They are not replaced by the bundled ones, nor by images beside them."""
    for beside in ({}, {"arr_0": PIXELS[40:80]}):
        np.savez(tmp_path / "reference.npz", mu=np.zeros(mu), sigma=np.ones(sigma), **beside)
        result = call("evaluate", folders[0], "--reference", tmp_path / "reference.npz", "--metrics", "fd")
        refused(result, "reference.npz: expected mu [C] and sigma [C, C] with C = 256 or 2048", found)


def test_statistics_of_another_network_are_not_replaced(tmp_path, folders):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    flags = (folders[0], "--reference", tmp_path / "reference.npz", "--metrics")
    refused(call("evaluate", *flags, "fd"), "--reference", "of 2048 features, expected 256", "--metrics fd")
    result, found, _ = evaluate(tmp_path, *flags, "fd", "fid")
    assert found == {} and "left out: fd: " in result.out and "of 2048 features, expected 256" in result.out


def test_a_reference_of_both(tmp_path, folders):
    """ADM's files: what their statistics do not serve takes their images."""
    images, _, _ = folders
    np.savez(tmp_path / "reference.npz", arr_0=PIXELS[40:80], mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "images.npz", arr_0=PIXELS[40:80])
    flags = ("--metrics", "fd", "kid_cifar10", "prc_cifar10", "--kid_subset_size", 20)
    values = [
        evaluate(tmp_path, images, "--reference", tmp_path / f"{name}.npz", *flags)[1]
        for name in ("reference", "images")
    ]
    assert values[0] == values[1] and len(values[0]) == 4


class StandIn(Cifar10FeatureExtractor):
    """The bundled network in VGG16's place."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, ["256"])
        self.asked = features_list

    @staticmethod
    def get_provided_features_list():
        return "256", "fc2_relu"


def test_networks_that_are_given(tmp_path, folders, monkeypatch):
    """VGG16, LPIPS and CLIP, of which stand-ins take the place."""
    images, floats, other = folders
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "vgg16", StandIn)
    monkeypatch.setattr("qdiff.cli.evaluate.pairs.Lpips", lambda folder: Cifar10Distance())
    monkeypatch.setattr(
        "qdiff.cli.evaluate.pairs.ClipScore",
        lambda folder, device: lambda batch, prompts: 20.0 + torch.arange(len(batch)) % 2,
    )
    torch.save({}, tmp_path / "vgg.pth")
    for name in LPIPS_FILES:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird")
    flags = ("--vgg", tmp_path / "vgg.pth", "--lpips", tmp_path, "--clip", tmp_path / "vit", "--float", floats)
    flags += ("--metrics", "prc", "prc_cifar10", "lpips", "perceptual", "clip", "--prompts", tmp_path / "prompts.txt")
    _, found, content = evaluate(tmp_path, images, "--reference", other, *flags)
    assert (found["precision"], found["recall"]) == (found["precision_cifar10"], found["recall_cifar10"])
    assert found["lpips"] == found["perceptual"] and found["clip"] == 20.5
    labels = {row["metric"]: row["label"] for row in content["scores"]}
    assert labels["clip"] == "CLIP score (vit)" and labels["precision"] == "precision (VGG16)"


def test_a_registered_reference(tmp_path, folders, monkeypatch):
    images, _, other = folders
    monkeypatch.setitem(DATASETS_REGISTRY, "cifar10-val", lambda root, download: tensor(PIXELS[40:80]))
    _, found, _ = evaluate(tmp_path, images, "--reference", "cifar10-val", "--metrics", "fd")
    _, expected, _ = evaluate(tmp_path, images, "--reference", other, "--metrics", "fd")
    assert found["fd"] == pytest.approx(expected["fd"], rel=1e-6)


def test_prompts(tmp_path, folders):
    _, floats, _ = folders
    prompts = [f"a photo of a {CLASSES[label]}" for label in LABELS[:40]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = ("--metrics", "accuracy", "clip")
    result, found, content = evaluate(tmp_path, floats, "--prompts", tmp_path / "prompts.txt", *flags)
    expected = prompt_accuracy(tensor(PIXELS[:40]), prompts)
    assert found == {"accuracy": pytest.approx(expected)} and "left out: clip: no CLIP model (--clip DIR)" in result.out
    (row,) = content["scores"]
    assert row["half_width"] == pytest.approx(1.959964 * math.sqrt(expected * (1 - expected) / 40))
    (tmp_path / "some.txt").write_text("a cat\na house")
    result, found, _ = evaluate(tmp_path, floats, "--prompts", tmp_path / "some.txt", "--metrics", "accuracy")
    assert found == {} and "left out: accuracy: prompt 'a house'" in result.out


def test_a_run_brings_its_prompts(tmp_path):
    run = tmp_path / "run"
    write_images(run / "samples", PIXELS[:5])
    (run / "prompts.txt").write_text("".join(f"a {CLASSES[label]}\n" for label in LABELS[:5]))
    _, found, _ = evaluate(tmp_path, run, "--metrics", "accuracy")
    assert found["accuracy"] >= 0.6


def test_a_run_lacks_an_image(tmp_path):
    """The others keep their prompts: its own ones, and given ones."""
    run = tmp_path / "run"
    write_images(run / "samples", PIXELS[:8])
    (run / "sampling_config.yaml").write_text("images_in: samples\n")
    prompts = "".join(f"a {CLASSES[label]}\n" for label in LABELS[:8])
    (run / "prompts.txt").write_text(prompts)
    (tmp_path / "given.txt").write_text(prompts)
    named = [line["value"] for line in evaluate(tmp_path, run, "--metrics", "accuracy")[2]["scores"]]
    (run / "samples" / "1.png").unlink()
    right = prompt_accuracy(tensor(PIXELS[[0, *range(2, 8)]]), [f"a {CLASSES[LABELS[i]]}" for i in (0, *range(2, 8))])
    for flags in ((), ("--prompts", tmp_path / "given.txt")):
        assert evaluate(tmp_path, run, "--metrics", "accuracy", *flags)[1] == {"accuracy": pytest.approx(right)}
    assert named[0] >= 0.6 and right >= 0.5


def test_pairs_go_by_number(tmp_path, folders):
    """Though both sets have as many images, each lacks another one."""
    _, floats, _ = folders
    some = write_images(tmp_path / "some", noisy(PIXELS[:40]), [f"sample_{i:06}.png" for i in range(40)])
    flags = (some, "--float", floats, "--metrics", "psnr", "ssim", "perceptual", "--bootstrap", 0)
    (some / "sample_000003.png").unlink()
    result, found, _ = evaluate(tmp_path, *flags)
    chosen = [i for i in range(40) if i != 3]
    a, b = tensor(noisy(PIXELS[:40])[chosen]), tensor(PIXELS[:40][chosen])
    assert found["psnr"] == pytest.approx(pooled_psnr_db(a / 255, b / 255), rel=1e-6)
    assert found["ssim"] == pytest.approx(ssim(a, b).mean().item(), rel=1e-12)
    assert any(
        line.endswith("float: without a partner of the same number or name: 3.png") for line in result.complaints
    )
    fewer = write_images(tmp_path / "fewer", PIXELS[:39])
    result, found, _ = evaluate(tmp_path, some, "--float", fewer, *flags[3:])
    assert found == {} and "no float image of the number or name of sample_000039.png" in result.out


def test_identical_images_are_said_to_be(tmp_path, folders):
    _, floats, _ = folders
    result, found, content = evaluate(tmp_path, floats, "--float", floats, "--metrics", "psnr", "ssim")
    assert found["psnr"] is found["psnr_mean"] is None and found["ssim"] == pytest.approx(1)
    assert "40 of 40 images identical" in result.out


@pytest.mark.long
def test_intervals(tmp_path, folders):
    images, floats, _ = folders
    _, _, content = evaluate(tmp_path, images, "--float", floats)
    rows = {row["metric"]: row for row in content["scores"]}
    assert all(row["low"] < row["value"] < row["high"] for row in rows.values())
    _, _, again = evaluate(tmp_path, images, "--float", floats)
    assert again == content
    _, _, without = evaluate(tmp_path, images, "--float", floats, "--bootstrap", 0)
    assert all(row["half_width"] is row["low"] is None for row in without["scores"])
    assert [row["value"] for row in without["scores"]] == [row["value"] for row in content["scores"]]


def test_files(tmp_path, folders):
    images, floats, other = folders
    flags = ("--float", floats, "--metrics", "fd", "psnr", "--outdir", tmp_path / "out")
    result = call("evaluate", images, other, *flags)
    assert result.code == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["scores"]) == 6
    assert [float(line["value"]) for line in lines] == [row["value"] for row in content["scores"]]
    assert {line["images"] for line in lines} == {str(images), str(other)} and lines[0]["count"] == "40"
    assert len(content["sha256"][str(images)]) == 64 and "float" in content["sha256"]
    assert result.out.count(str(images)) == 3 and (tmp_path / "out" / "run.log").is_file()


@pytest.mark.long
def test_what_is_kept_of_references(tmp_path, folders, monkeypatch):
    images, floats, _ = folders
    flags = (images, "--float", floats, "--metrics", "fd_float")
    first, found, _ = evaluate(tmp_path, *flags)
    (kept,) = (tmp_path / "cache").iterdir()
    second, again, _ = evaluate(tmp_path, *flags)
    assert again == found and (first.bars, second.bars) == (["features"], ["features"])
    kept.write_bytes(kept.read_bytes()[:-3])
    third, same, _ = evaluate(tmp_path, *flags)
    assert same == found and any(str(kept) in line and "computing anew" in line for line in third.complaints)
    evaluate(tmp_path, *flags, "--cache", tmp_path / "own")
    assert len(list((tmp_path / "own").iterdir())) == 1
    kept.unlink()
    evaluate(tmp_path, *flags, "--no_cache")
    assert not kept.exists()


def test_warnings(tmp_path, folders):
    images, floats, _ = folders
    few = write_images(tmp_path / "few", PIXELS[:9])
    result, found, _ = evaluate(tmp_path, images, "--float", few, "--metrics", "psnr", "ssim", "fd_float")
    assert found.keys() == {"fd_float"}
    assert "left out: psnr, ssim: images and float images make no pairs: 40 of 32x32 and 9 of 32x32; " in result.out
    assert "no float image of the number or name of 9.png, 10.png, 11.png and 28 more" in result.out
    assert any("40 images, and 9 float ones" in line for line in result.complaints)
    (tmp_path / "jpeg").mkdir()
    for i in range(3):
        Image.fromarray(PIXELS[i]).save(tmp_path / "jpeg" / f"{i}.jpg")
    result, _, _ = evaluate(tmp_path, tmp_path / "jpeg", "--float", floats, "--metrics", "ssim")
    assert any("JPEG files" in line for line in result.complaints)


def test_images_of_another_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 24, 40, 3), np.uint8)
    one = write_images(tmp_path / "one", pixels)
    two = write_images(tmp_path / "two", noisy(pixels))
    result, found, _ = evaluate(tmp_path, one, "--float", two)
    assert found.keys() == {"psnr", "psnr_mean", "ssim"}
    assert "left out: fd, fd_float, kid_cifar10, prc_cifar10, perceptual: CIFAR-10 features take" in result.out


def test_images_may_stand_anywhere(tmp_path, folders):
    images, floats, other = folders
    _, _, content = evaluate(tmp_path, "--metrics", "psnr", "--float", floats, images, "--bootstrap", 0, other)
    assert {row["images"] for row in content["scores"]} == {str(images), str(other)}


def test_the_plan(folders):
    images, floats, _ = folders
    result = call("evaluate", images, "--float", floats, "--metrics", "fd", "--dry_run")
    assert result.code == 0 and str(images) in result.out and "- fd" in result.out and result.err == ""


@pytest.mark.parametrize("what", ["missing", "empty", "sizes", "text", "truncated", "npz", "float", "reference"])
def test_bad_input_is_one_line(tmp_path, folders, what):
    images, _, _ = folders
    bad = tmp_path / "bad"
    if what != "missing":
        write_images(bad, PIXELS[:3] if what not in ("empty", "npz") else [])
    flags, parts = (bad,), ()
    if what in ("missing", "empty"):
        parts = ("found no",)
    elif what == "sizes":
        write_images(bad / "more", PIXELS[:1, :16, :16], ["9.png"])
        (bad / "more" / "9.png").rename(bad / "9.png")
        parts = ("images of one size, found 32x32 (0.png) and 16x16 (9.png)",)
    elif what == "text":
        (bad / "1.png").write_text("text")
        parts = ("1.png: expected an image",)
    elif what == "truncated":
        (bad / "1.png").write_bytes((bad / "1.png").read_bytes()[:900])
        parts = ("1.png: expected an image, found a damaged one",)
    elif what == "npz":
        np.savez(bad / "a.npz", x=np.zeros(3))
        flags, parts = (bad / "a.npz",), ("expected an array 'arr_0', found x",)
    elif what == "float":
        flags, parts = (images, "--float", tmp_path / "absent"), ("absent: expected a folder",)
    else:
        flags, parts = (images, "--reference", tmp_path / "absent"), ("absent: expected a folder",)
    refused(call("evaluate", *flags), *parts)


def test_bad_flags_are_one_line(tmp_path, folders, tiny):
    images, _, _ = folders
    (tmp_path / "weights.pth").write_text("text")
    refused(call("evaluate"), "expected a folder or an .npz, or a model")
    refused(call("evaluate", images, *tiny.model), "give images, or a model to sample, not both")
    refused(call("evaluate", images, "--inception", tmp_path / "absent"), "--inception", "no such file")
    flags = ("--reference", images, "--metrics", "fid", "--inception", tmp_path / "weights.pth")
    refused(call("evaluate", images, *flags), "weights.pth: not a readable file of weights")
    refused(call("evaluate", images, "--metrics", "fidelity"), "--metrics", "fidelity")
    refused(call("evaluate", images, "--cali_ckpt", "x.safetensors"), "name its float model too")
    refused(call("evaluate", images, "--prompts", tmp_path / "absent"), "--prompts", "no such file")
    refused(call("evaluate", images, "--cost"), "--cost: takes a model")
    refused(call("evaluate", "--cost"), "--cost: name a model")
    refused(call("evaluate", images, "--lpips", tmp_path, "--float", images, "--metrics", "lpips"), "is missing")
    refused(call("evaluate", images, "--device", "nowhere"), "--device nowhere")
