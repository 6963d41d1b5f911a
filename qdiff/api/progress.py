"""A bar on the screen for a calibration under way."""

from __future__ import annotations

from tqdm import tqdm

from qdiff.calibration.context import Progress


class BarProgress(Progress):
    """A progress bar on the terminal with an estimate of what is left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def start(self, title: str, total: int) -> None:
        self._bar = tqdm(total=total, desc=title, dynamic_ncols=True)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)

    def finish(self) -> None:
        self._bar.close()
