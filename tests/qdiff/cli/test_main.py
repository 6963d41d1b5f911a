"""The qdiff command: one name for all commands, a model of any family by -m, and mistakes in one line."""

import importlib
import logging
import subprocess
import sys

import pytest
from latents import LDM
from running import only_run, tree

from qdiff import __version__
from qdiff.cli import main as command
from qdiff.cli.main import CHECKS, COMMANDS, resolve, run


@pytest.fixture
def said(capsys, monkeypatch):
    """(arguments) -> (exit code, standard output, lines of standard error that are no progress bar)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["qdiff"])
        root, code = logging.getLogger(), 0
        handlers, level, root.handlers[:] = root.handlers[:], root.level, []  # none is there when a command begins
        try:
            run([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code or 0
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
        out, err = capsys.readouterr()
        return (
            code,
            out,
            [line for line in err.splitlines() if line.strip() and "it/s" not in line and "step/s" not in line],
        )

    return call


def test_help_names_every_command(said):
    for arguments in ((), ("-h",), ("--help",)):
        code, out, err = said(*arguments)
        assert code == 0 and err == [] and all(f"\n  {name} " in out for name in COMMANDS)
        assert max(map(len, out.splitlines())) <= 100
    assert said("--version") == (0, f"qdiff {__version__}\n", [])


def test_nothing_heavy_is_imported_for_help():
    told = "import sys; from qdiff.cli.main import run; run(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("sample", "check")])
def test_every_command_has_help_under_its_name(said, name):
    code, out, err = said(name, "--help")
    assert code == 0 and err == [] and f"qdiff {name}" in out.splitlines()[0]


def test_help_of_the_commands_with_parts(said, tiny, latent):
    for arguments in (("sample", "--help"), ("check", "--help")):
        code, out, err = said(*arguments)
        assert code == 0 and err == [] and f"usage: qdiff {arguments[0]}" in out
    for path, flag in ((tiny.config, "--skip_type"), (latent.ldm.folder, "--custom_steps"), (latent.sd.ckpt, "--plms")):
        code, out, _ = said("sample", "-m", path, "--help")
        assert code == 0 and out.startswith("usage: qdiff sample") and flag in out
    for name in CHECKS:
        assert said("check", name, "--help")[1].startswith(f"usage: qdiff check {name}")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("quantise",), ("quantise", "quantize")),
        (("check",), ("check", "checkpoint or prompts", "nothing")),
        (("check", "all"), ("check", "found all")),
        (("sample",), ("-m/--model", "none")),
        (("sample", "-m"), ("-m/--model", "path")),
        (("sample", "-m", "nope.yml"), ("nope.yml", "no such")),
        (("sample", "-m", "nope"), ("nope", "no such")),
        (("sample", "-m", "a", "--model=b"), ("-m/--model", "2")),
        (("record", "-m", "nope", "--out", "x"), ("nope", "no such")),
        (("quantize", "-m", "nope"), ("--out", "required")),
        (("evaluate", "--nope"), ("--nope",)),
    ],
)
def test_mistakes_are_one_line(said, arguments, names, tmp_path):
    code, _, err = said(*arguments)
    assert code == 2 and len(err) == 1 and err[0].startswith("qdiff"), err
    assert all(name in err[0] for name in names), err
    assert tree(tmp_path) == {}


def test_models_are_named_alike(tiny, latent):
    pixel = ["--config", str(tiny.config), "--use_pretrained"]
    assert resolve(["record", "-m", str(tiny.config), "--out", "x"])[2] == [*pixel, "--out", "x"]
    assert resolve(["compare", f"--model={tiny.config}"])[2] == pixel
    folder = str(latent.ldm.folder)
    assert resolve(["evaluate", "--cost", "-m", folder])[2] == ["--cost", "-r", folder]
    _, module, flags, _ = resolve(["sample", "-m", str(tiny.config), "--steps", "4", "--images=2", "--ckpt", "w"])
    assert module == "qdiff.cli.sample.ddim" and "--use_pretrained" not in flags
    assert flags == ["--config", str(tiny.config), "--timesteps", "4", "--max_images=2", "--ckpt", "w"]
    assert resolve(["sample", "-m", folder, "--seed=3"])[2] == ["-r", folder, "--seed=3"]
    sd = str(latent.sd.ckpt)
    assert resolve(["sample", "-m", sd, "--steps", "5"])[2][:4] == ["--ckpt", sd, "--ddim_steps", "5"]


def test_every_command_has_its_module():
    modules = [c.module for c in COMMANDS.values() if c.module] + list(CHECKS.values())
    assert all(callable(importlib.import_module(module).main) for module in modules)


def test_quantize_then_sample(said, latent, tmp_path):
    """What `qdiff quantize` writes is what the sampling script calibrates; a second call finds it done."""
    model = ("-m", latent.ldm.folder)
    calibration = ("--method", "nearest", "--weight_bit", 4, "--quant_act", "--cali_st", 2, "--cali_n", 2)
    quantize = ("quantize", *model, "--timesteps", 4, "--skip_type", "quad", *calibration, "--seed", 41)
    code, _, err = said(*quantize, "--out", tmp_path / "q")
    assert code == 2 and "--skip_type: for pixel models only" in err[0]
    quantize = tuple(a for a in quantize if a not in ("--skip_type", "quad"))
    code, out, err = said(*quantize, "--batch_size", 2, "--out", tmp_path / "q")
    assert code == 0 and err == [] and "q/ckpt.safetensors: W4A8, by nearest" in out
    assert {"ckpt.safetensors", "ckpt.pth", "report.html", "run.log"} <= set(tree(tmp_path / "q")) | {
        path.name for path in (tmp_path / "q").iterdir()
    }
    first = (tmp_path / "q" / "ckpt.safetensors").read_bytes()
    assert said(*quantize, "--batch_size", 2, "--out", tmp_path / "q")[0] == 0
    assert (tmp_path / "q" / "ckpt.safetensors").read_bytes() == first
    loads = ("--ptq", "--quant_act", "--cali_ckpt", tmp_path / "q" / "ckpt.safetensors")
    flags = ("--batch_size", 2, "-e", 0, "--seed", 41)
    assert said("sample", *model, "--steps", 4, "--images", 3, *flags, *loads, "--out", tmp_path / "s")[0] == 0
    assert said("sample", *model, *LDM[:2], "-c", 4, *flags, "--ptq", *calibration[:-4], *calibration[-4:], "--out",
                tmp_path / "t")[0] == 0  # fmt: skip
    pictures = [[path.read_bytes() for path in sorted((only_run(tmp_path / out) / "img").iterdir())] for out in "st"]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 3


def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qdiff", "--version"])
    import runpy

    runpy.run_module("qdiff", run_name="__main__")
    assert capsys.readouterr().out == f"qdiff {__version__}\n" and command.GOES_ON
