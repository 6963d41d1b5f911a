"""Where the images of a run's folder lie, and its prompts."""

import re

import pytest
from PIL import Image

from qdiff.evaluation.images import open_images
from qdiff.evaluation.runs import images_folder, read_run_prompts


def fill(folder, *names):
    """Write small images and text files below a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "inner"),
    [
        (["samples/0.png", "grid-0000.png", "sampling_config.yaml"], "samples"),
        (["samples/0.png", "grid-0000.png", "grid-0001.png"], "samples"),  # of CompVis' script
        (["img/0.png", "calibration_loss.png", "run.log"], "img"),
        (["img/0.png", "calibration_loss.png", "sampling_config.yml"], "img"),
        (["img/0.png"], "img"),
        (["0.png", "sampling_config.yaml"], "."),  # of evaluate.py
        (["0.png", "samples/0.png"], "."),  # no run
        (["0.png", "run.log", "results.json"], "."),  # evaluate.py --outdir has left its own files there
    ],
)
def test_a_layout_tells(tmp_path, names, inner):
    assert images_folder(fill(tmp_path, *names)) == tmp_path / inner


def test_a_run_says_where_its_images_lie(tmp_path):
    fill(tmp_path, "samples/0.png", "img/0.png", "elsewhere/0.png", "elsewhere/1.png", "grid-0000.png")
    (tmp_path / "sampling_config.yaml").write_text("images: 2\nimages_in: elsewhere\n")
    assert images_folder(tmp_path) == tmp_path / "elsewhere" and len(open_images(tmp_path)) == 2


@pytest.mark.parametrize(
    ("config", "names", "reason"),
    [
        ("images_in: null", ["grid-0000.png"], "found a run that kept none$"),
        ("images_in: null", ["statistics.npz"], "kept none; .*statistics.npz serves as a reference"),
        ("images_in: img", ["calibration_loss.png"], "img: expected the images of the run, found none; is the run"),
        ("images_in: ../x", ["0.png"], r"images_in: expected a folder within the run's, found '\.\./x'"),
        ("images_in: /tmp", ["0.png"], "expected a folder within"),
        ("images_in: 3", ["0.png"], "expected a folder within"),
        ("[" * 5000, ["0.png"], "sampling_config.yaml: expected the description of a run"),
        ("- 1", ["0.png"], "sampling_config.yaml: expected the description of a run, found list"),
        ("images: 3", ["grid-0000.png"], "found a run that kept its grid alone"),
    ],
)
def test_what_holds_no_images_is_named(tmp_path, config, names, reason):
    fill(tmp_path, *names)
    (tmp_path / "sampling_config.yaml").write_text(config)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.*{reason}"):
        images_folder(tmp_path)


def test_a_comparison_is_no_set_of_images(tmp_path):
    with pytest.raises(ValueError, match="expected images, found a comparison"):
        images_folder(fill(tmp_path, "comparison.yaml", "comparison.png", "errors.png"))


def test_folders_of_images_are_named(tmp_path):
    """As those of evaluate.py that samples a model, of which either may be meant."""
    with pytest.raises(ValueError, match="found none but in float, images$"):
        open_images(fill(tmp_path, "images/0.png", "float/0.png", "results.json"))


@pytest.mark.parametrize("prompts", [("",), ("", ""), ("a cat", "", " two  words ", ""), ("\ufeffa\tb", "写真\u3000")])
def test_prompts_are_read_as_they_are(tmp_path, prompts):
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf8")
    assert read_run_prompts(tmp_path) == prompts


def test_prompts_that_an_editor_has_saved(tmp_path):
    assert read_run_prompts(tmp_path) is None
    (tmp_path / "prompts.txt").write_bytes(b"a cat\r\na dog")
    assert read_run_prompts(tmp_path) == ("a cat", "a dog")
    (tmp_path / "prompts.txt").write_bytes(b"a\n\xff")
    with pytest.raises(ValueError, match="prompts.txt: expected UTF-8 text, found byte 0xff"):
        read_run_prompts(tmp_path)
