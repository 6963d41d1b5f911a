"""Tables that read well on a screen and render as Markdown."""

from typing import Any

MISSING = "–"
FD_NAME = "FD (CIFAR-10 features)"  # in every table: the Fréchet distance of `qdiff.evaluation.fidelity`


def markdown_table(rows: list[dict[str, Any]], columns: list[tuple[str, str, str]]) -> str:
    """rows as an aligned Markdown table, without a final newline: numbers to the right, text to the left.

    columns: (key, header, format), the format as in `format(value, ".2f")`. None and absent values show as "–".
    Raises ValueError where a key occurs in no row (a misspelt one) or a value does not take its format.
    """
    if not columns:
        raise ValueError("columns: expected at least one (key, header, format), found none")
    lines = [[] for _ in range(len(rows) + 2)]  # header, rule, one line per row
    for key, header, spec in columns:
        if rows and all(key not in row for row in rows):
            raise ValueError(f"column {key!r}: expected it in some row, found only {', '.join(map(repr, rows[0]))}")
        values = [row.get(key) for row in rows]
        cells = [escape(header)] + [cell(value, key, spec) for value in values]
        width = max(3, *map(len, cells))  # Markdown's rule takes three characters
        as_text = any(isinstance(value, str) for value in values)
        padded = [text.ljust(width) if as_text else text.rjust(width) for text in cells]
        rule = "-" * width if as_text else "-" * (width - 1) + ":"
        for line, text in zip(lines, [padded[0], rule, *padded[1:]], strict=True):
            line.append(text)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any, key: str, spec: str) -> str:
    if value is None:
        return MISSING
    try:
        return escape(format(value, spec))
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {key!r}: expected a value for the format {spec!r}, found {value!r}") from error


def escape(text: str) -> str:
    return " ".join(text.split("\n")).replace("|", "\\|")
