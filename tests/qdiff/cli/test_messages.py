"""What people see of names that files hold: nothing that a terminal obeys."""

import logging
import sys

import pytest

from qdiff.cli.command import PlainFormatter, printable, run_main, start_log

EVIL = "a\x1b[2J\x07\x9b1mb\u202ec"
PLAIN = "a\\x1b[2J\\x07\\x9b1mb\\u202ec"


@pytest.fixture
def no_log(monkeypatch):
    """Take away what pytest listens with, as in a script that has just started."""

    def start():
        monkeypatch.setattr(sys, "argv", ["script.py"])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))

    yield start
    logging.getLogger().setLevel(logging.WARNING)


def test_characters_that_do_not_print_are_escaped():
    assert printable(EVIL) == PLAIN
    assert printable("größer: 大 é") == "größer: 大 é"
    assert printable("a\nb\tc", kept="\n") == "a\nb\\tc"


@pytest.mark.parametrize("logged", [False, True], ids=["stderr", "log"])
def test_the_line_of_an_error_is_escaped(no_log, capsys, tmp_path, logged):
    no_log()

    def main(argv):
        if logged:
            start_log(tmp_path, verbose=False)
        raise ValueError(f"{EVIL}: no such\nmodel")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.endswith(f"{PLAIN}: no such model\n") and line.count("\n") == 1
    if logged:
        assert f"{PLAIN}: no such model\n" in (tmp_path / "run.log").read_text(encoding="utf8")


def test_warnings_are_escaped_before_and_after_the_log_is_started(no_log, capsys, tmp_path):
    no_log()

    def main(argv):
        logging.getLogger("qdiff").warning("before: %s", EVIL)
        start_log(tmp_path, verbose=False)
        logging.getLogger("qdiff").warning("after: %s", EVIL)

    run_main(main)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"before: {PLAIN}" and lines[1].endswith(f"WARNING after: {PLAIN}")


def test_tracebacks_keep_their_lines():
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    text = PlainFormatter().format(record)
    assert text.startswith("failed\nTraceback") and text.endswith(f"ValueError: {PLAIN}")
