"""Running a script and looking at what it leaves: exit code, standard error line by line, files byte by byte."""

import contextlib
import io
import logging
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from qdiff.cli.command import run_main

SCRIPTS = Path(__file__).parents[3] / "scripts"
BAR = re.compile(r"\d+%\||\d+(call|it) \[|^\s*$")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Result:
    """What a script left behind: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """Lines on standard error that are no progress bars."""
        return [line for line in re.split(r"[\r\n]", self.err) if not BAR.search(line)]

    @property
    def bars(self) -> list[str]:
        """Titles of the progress bars, in the order in which they appeared."""
        return list(dict.fromkeys(re.findall(r"([a-z ]+):\s+\d+%\|", self.err)))


def command(script: str, *args) -> list[str]:
    """The command line of a script, for a process of its own."""
    return [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, args)]


def launch(script: str, *args, cwd: Path | None = None) -> Result:
    """Run a script in a process of its own."""
    done = subprocess.run(
        command(script, *args), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def call(script: str, *args) -> Result:
    """Run a script in this process: the same path from sys.argv to the exit code, without the start."""
    main = runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"]
    root, out, err = logging.getLogger(), io.StringIO(), io.StringIO()
    argv, handlers, level = sys.argv, root.handlers[:], root.level
    sys.argv, root.handlers[:] = command(script, *args)[1:], []  # a fresh process has no handlers
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        for handler in root.handlers:
            handler.close()
        sys.argv, root.handlers[:] = argv, handlers
        root.setLevel(level)
    return Result(code, out.getvalue(), err.getvalue())


def passed(result: Result) -> Result:
    """Assert that a script did its work without a complaint."""
    assert result.code == 0 and result.complaints == [], result.err
    return result


def refused(result: Result, *parts) -> str:
    """Assert that a script ended as the house rule says: exit code 2, and one line that names all `parts`."""
    assert result.code == 2 and "Traceback" not in result.err, (result.code, result.err)
    assert len(result.complaints) == 1, result.complaints
    line = result.complaints[0]
    assert all(str(part) in line for part in parts), line
    assert len(line) < 800, line  # paths can be long
    return line


def only_run(logdir: Path) -> Path:
    """The one folder that runs have made in `logdir`."""
    (folder,) = (logdir / "samples").iterdir()
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """What is below a folder: files with their bytes, folders with None; not what holds times and command lines."""
    found = (path for path in sorted(folder.rglob("*")) if path.name not in ("run.log", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def pictures(run: Path) -> list[bytes]:
    """The bytes of img/0.png, 1.png, ... of a run's folder."""
    files = sorted((run / "img").iterdir(), key=lambda file: int(file.stem))
    assert [file.name for file in files] == [f"{i}.png" for i in range(len(files))]
    return [file.read_bytes() for file in files]


def shorten(source, path, share):
    """Write the first part of a file: all but one byte with share 1."""
    content = source.read_bytes()
    path.write_bytes(content[: min(int(share * len(content)), len(content) - 1)])
    return path
