"""A picture that compares methods: one row per method, one column per seed."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qdiff.utils.atomic import atomic

from .similarity import require_unit_range, to_uint8

MARGIN = 16  # pixels around the picture, and between labels and images
WHITE, INK, GREY = "#ffffff", "#1a1a1a", "#5f6368"


@dataclass(frozen=True)
class TextLine:
    text: str
    font: ImageFont.FreeTypeFont
    colour: str

    @property
    def height(self) -> int:
        return sum(self.font.getmetrics())

    @property
    def width(self) -> int:
        return round(self.font.getlength(self.text))


def comparison_picture(
    rows: list[tuple[str, Tensor]],
    path: Path | str,
    columns: int = 8,
    scale: int = 3,
    captions: list[str] | None = None,
) -> None:
    """Writes a PNG: each row a label, an optional grey caption under it, and the first `columns` images of its tensor.

    rows: (label, images [N, 3, H, W] in [0, 1]), all of one shape; NaN pixels are black. scale: pixels on the picture
    per image pixel, each way, by nearest neighbour. captions: one per row, "" for none; a line break starts a new line.
    The file appears whole or not at all. Raises ValueError for arguments that do not fit together, FileNotFoundError
    where the folder of path does not exist.
    """
    path = Path(path)
    captions = [""] * len(rows) if captions is None else captions
    require_rows(rows, columns, scale, captions)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected its folder to exist, found none")
    gap = max(3, rows[0][1].shape[3] * scale // 32)
    strips = [strip(images[:columns], scale, gap) for _, images in rows]
    texts = [text_block(label, caption, strips[0].height) for (label, _), caption in zip(rows, captions, strict=True)]
    with atomic(path) as temporary:
        stack(texts, strips, 3 * gap).save(temporary, format="PNG", optimize=True)


def strip(images: Tensor, scale: int, gap: int) -> Image.Image:
    """Images [N, 3, H, W] side by side, enlarged, with gap white pixels between them."""
    n, _, height, width = images.shape
    step = width * scale + gap
    row = Image.new("RGB", (n * step - gap, height * scale), WHITE)
    for i, pixels in enumerate(to_uint8(images.detach().nan_to_num(0))):
        picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        row.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (i * step, 0))
    return row


def text_block(label: str, caption: str, row_height: int) -> list[TextLine]:
    size = min(max(row_height // 6, 13), 28)
    strong, plain = font("DejaVuSans-Bold", size), font("DejaVuSans", round(0.85 * size))
    lines = [TextLine(text, strong, INK) for text in label.split("\n") if text]
    return lines + [TextLine(text, plain, GREY) for text in (caption or "").split("\n") if text]


def text_height(lines: list[TextLine]) -> int:
    return sum(line.height for line in lines)


def stack(texts: list[list[TextLine]], strips: list[Image.Image], gap: int) -> Image.Image:
    """The rows below each other; a row is as high as the higher of its images and its text."""
    pairs = list(zip(texts, strips, strict=True))
    heights = [max(images.height, text_height(lines)) for lines, images in pairs]
    text_width = max((line.width for lines in texts for line in lines), default=0)
    left = MARGIN + (text_width + MARGIN if text_width else 0)
    size = (left + strips[0].width + MARGIN, sum(heights) + gap * (len(strips) - 1) + 2 * MARGIN)
    canvas = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for (lines, images), height in zip(pairs, heights, strict=True):
        canvas.paste(images, (left, top + (height - images.height) // 2))
        y = top + (height - text_height(lines)) // 2
        for line in lines:
            draw.text((MARGIN, y), line.text, fill=line.colour, font=line.font)
            y += line.height
        top += height + gap
    return canvas


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu, so the picture looks the same on a machine without fonts
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def require_rows(rows: list[tuple[str, Tensor]], columns: int, scale: int, captions: list[str]) -> None:
    """Raises ValueError unless there is a row, all rows share a shape [N, 3, H, W], and captions match them."""
    if not rows:
        raise ValueError("rows: expected at least one (label, images), found none")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale: expected 1 or more, found {columns} and {scale}")
    if len(captions) != len(rows):
        raise ValueError(f"captions: expected one per row ({len(rows)}), found {len(captions)}")
    first = rows[0][1].shape
    for label, images in rows:
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"row {label!r}: expected images [N, 3, H, W], found {list(images.shape)}")
        if images.shape != first:
            raise ValueError(f"row {label!r}: expected {list(first)} as in the first row, found {list(images.shape)}")
        require_unit_range(images, f"row {label!r}")
