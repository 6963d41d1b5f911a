"""Errors about one option: Python names the field, the command line the flag that stands for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class FieldError(ValueError):
    """An option is at fault. Its text is the field's name followed by what is wrong: "steps 9: expected at most 4"."""

    def __init__(self, field: str, wrong: str) -> None:
        """wrong: begins with a space and the value, or with a colon."""
        super().__init__(f"{field}{wrong}")
        self.field, self.wrong = field, wrong


@contextmanager
def flags_named(flags: Mapping[str, str]) -> Iterator[None]:
    """Within the block errors about a field name its flag. flags: field -> flag, as "steps" -> "--timesteps"."""
    try:
        yield
    except FieldError as error:
        if error.field not in flags:
            raise
        raise ValueError(f"{flags[error.field]}{error.wrong}") from error
