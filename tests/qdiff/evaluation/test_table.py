import math

import pytest

from qdiff.evaluation.table import markdown_table

COLUMNS = [("method", "Method", ""), ("psnr", "PSNR (dB)", ".1f"), ("bytes", "Bytes", ",")]


def test_numbers_align_right_and_text_left():
    rows = [
        {"method": "float32", "psnr": None, "bytes": 35_818_508},
        {"method": "Q-Diffusion", "psnr": 11.74, "bytes": 4_600_000},
        {"method": "same", "psnr": math.inf},
    ]
    assert markdown_table(rows, COLUMNS) == (
        "| Method      | PSNR (dB) |      Bytes |\n"
        "| ----------- | --------: | ---------: |\n"
        "| float32     |         – | 35,818,508 |\n"
        "| Q-Diffusion |      11.7 |  4,600,000 |\n"
        "| same        |       inf |          – |"
    )


def test_without_rows_the_header_remains():
    assert markdown_table([], [("a", "A", "")]) == "|   A |\n| --: |"


def test_a_cell_cannot_break_the_table():
    table = markdown_table([{"method": "a|b\nc"}], [("method", "Method", "")])
    assert table.splitlines()[2] == r"| a\|b c |"


def test_a_misspelt_key_is_an_error():
    with pytest.raises(ValueError, match="column 'psrn'.*found only 'psnr'"):
        markdown_table([{"psnr": 1.0}], [("psrn", "PSNR", ".1f")])


def test_a_value_that_does_not_fit_its_format_is_named():
    with pytest.raises(ValueError, match=r"column 'psnr'.*'\.1f', found 'high'"):
        markdown_table([{"psnr": "high"}], [("psnr", "PSNR", ".1f")])


def test_no_columns_are_an_error():
    with pytest.raises(ValueError, match="columns"):
        markdown_table([{"psnr": 1.0}], [])
