"""Errors about one option: Python names the field, the command line the flag that stands for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class FieldError(ValueError):
    """An option is at fault. Its text is the field's name followed by what is wrong: "steps 9: expected at most 4"."""

    def __init__(self, field: str, wrong: str, other: str = "") -> None:
        """wrong: begins with a space and the value, or with a colon, and has {} where it speaks of a field `other`."""
        self.field, self.wrong, self.other = field, wrong, other
        super().__init__(self.text({}))

    def text(self, flags: Mapping[str, str]) -> str:
        """The message with flags in place of fields that have one."""
        names = [flags.get(name, name) for name in (self.field, self.other)]
        return names[0] + (self.wrong.replace("{}", names[1]) if self.other else self.wrong)


@contextmanager
def flags_named(flags: Mapping[str, str]) -> Iterator[None]:
    """Within the block errors about a field name its flag. flags: field -> flag, as "steps" -> "--timesteps"."""
    try:
        yield
    except FieldError as error:
        if error.field not in flags:
            raise
        raise ValueError(error.text(flags)) from error
