import pytest
import torch
from PIL import Image

from qdiff.utils.images import load_png, save_png


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_errs_by_half_a_level_at_most(tmp_path, generator, channels):
    image = torch.rand(channels, 5, 7, generator=generator)
    save_png(image, tmp_path / "a.png")
    again = load_png(tmp_path / "a.png")
    assert again.shape == image.shape and again.dtype == torch.float32
    assert (again - image).abs().max() <= 0.5 / 255 + 1e-6
    save_png(again, tmp_path / "b.png")
    assert torch.equal(load_png(tmp_path / "b.png"), again)


def test_pixels_are_rounded_as_torchvision_does(tmp_path, generator):
    from torchvision.utils import save_image

    image = 1.2 * torch.rand(3, 16, 16, generator=generator) - 0.1  # some pixels lie outside [0, 1]
    save_png(image, tmp_path / "ours.png")
    save_image(image, tmp_path / "theirs.png")
    assert torch.equal(load_png(tmp_path / "ours.png"), load_png(tmp_path / "theirs.png"))


def test_nothing_but_the_image_is_left_behind(tmp_path, monkeypatch):
    save_png(torch.zeros(3, 4, 4), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, file, format):
        file.write_bytes(b"half an image")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(torch.ones(3, 4, 4), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: .*\[2, 4, 4\]"):
        save_png(torch.zeros(2, 4, 4), tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        load_png(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a\.png is not a readable image"):
        load_png(tmp_path / "a.png")
