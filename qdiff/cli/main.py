"""The `qdiff` command: one name for all that the toolkit does. Each command's module is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from qdiff import __version__

GOES_ON = ": the same command goes on where it stopped"
CONFIGURATIONS = (".yml", ".yaml")


class Command(NamedTuple):
    """A command: where its `main` is, and what it does in a line. model: whether it takes -m/--model."""

    module: str
    about: str
    model: bool = True
    interrupted: str = ""


COMMANDS = {
    "quantize": Command("qdiff.cli.calibrate", "calibrate a model and write the result", True, GOES_ON),
    "sample": Command("", "sample images of a model, float or quantized", True, GOES_ON),
    "record": Command("qdiff.cli.record", "record float sampling states for calibration", True, GOES_ON),
    "compare": Command("qdiff.cli.compare.command", "compare methods and bit widths on the same states", True, GOES_ON),
    "evaluate": Command("qdiff.cli.evaluate.command", "measure images: FID and the like; what a model costs"),
    "sensitivity": Command("qdiff.cli.sensitivity", "measure what each unit's quantization costs; mixed precision"),
    "export": Command("qdiff.cli.export", "write a calibrated model as packed file, ONNX or ckpt.pth"),
    "benchmark": Command("qdiff.cli.benchmark.command", "measure speed and memory against named baselines"),
    "report": Command("qdiff.cli.report", "write the report of a finished folder anew", False),
    "train": Command("qdiff.cli.train", "train a model as the bundled ones were made", False),
    "check": Command("", "check a checkpoint's golden case, or whether images show their prompts", False),
}
CHECKS = {"checkpoint": "qdiff.cli.check.checkpoint", "prompts": "qdiff.cli.check.prompts"}
# What `qdiff sample` calls alike, as the script of each kind of model calls it.
SAMPLING = {
    "pixel": ("qdiff.cli.sample.ddim", {"--steps": "--timesteps", "--images": "--max_images", "--out": "--logdir"}),
    "latent": ("qdiff.cli.sample.ldm", {"--steps": "--custom_steps", "--images": "--n_samples", "--out": "--logdir"}),
    "text": ("qdiff.cli.sample.txt2img", {"--steps": "--ddim_steps", "--images": "--n_samples", "--out": "--outdir"}),
}
SEED = "1234"  # of `qdiff sample`, where nothing is said
MODEL = """  -m PATH, --model PATH  the model: a pixel model's configuration (.yml), or a latent model's
                         checkpoint or the folder it lies in"""


def usage() -> str:
    """What `qdiff --help` says."""
    lines = [f"  {name:<12} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qdiff COMMAND [flags]",
            "",
            "Post-training quantization of diffusion models.",
            "",
            "commands:",
            *lines,
            "",
            "The model of every command that takes one:",
            MODEL,
            "",
            "qdiff COMMAND --help lists a command's flags; qdiff --version says the version.",
            "Bundled models and configurations: models/ and configs/ of the repository.",
        ]
    )


def with_model(arguments: Sequence[str], style: Callable[[str], list[str]]) -> list[str]:
    """The arguments with -m/--model PATH as the flags that a module has for it. Raises ValueError where PATH lacks."""
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("-m", "--model"):
            found.append(argument)
            continue
        path = value if equals else next(rest, None)
        if path is None:
            raise ValueError("-m/--model: expected a path, found none")
        found += style(path)
    return found


def general_style(path: str) -> list[str]:
    """The flags of commands that take all families."""
    return ["--config", path, "--use_pretrained"] if is_pixel(path) else ["-r", path]


def is_pixel(path: str) -> bool:
    """Whether a path names a pixel model."""
    if Path(path).suffix not in CONFIGURATIONS:
        return False
    from qdiff.families.open import is_latent_config

    return not is_latent_config(path)


def sampling_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(module, its arguments) of `qdiff sample`. Raises ValueError where no model is named."""
    paths: list[str] = []
    rest = with_model(arguments, lambda path: paths.append(path) or [])
    if len(paths) != 1:
        raise ValueError(f"-m/--model: expected one model, found {len(paths) or 'none'}")
    (path,) = paths
    if is_pixel(path):
        kind = "pixel"
    else:
        from qdiff.families.open import open_model

        kind = open_model(path).kind
    module, names = SAMPLING[kind]
    own = with_flags(rest, names)
    if kind == "pixel":
        return module, ["--config", path, *([] if "--ckpt" in own else ["--use_pretrained"]), *own]
    seed = [] if any(a.split("=")[0] == "--seed" for a in own) else ["--seed", SEED]
    return module, [*(["-r", path] if kind == "latent" else ["--ckpt", path]), *own, *seed]


def with_flags(arguments: Sequence[str], names: dict[str, str]) -> list[str]:
    """Arguments with some flags called otherwise."""
    parts = [argument.partition("=") for argument in arguments]
    return [names.get(name, name) + equals + value for name, equals, value in parts]


def resolve(arguments: Sequence[str]) -> tuple[str, str, list[str], str]:
    """(what the command is called, module, its arguments, what to add to "interrupted").

    Raises ValueError naming what is wrong with the arguments.
    """
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"{name}: expected a command of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if name == "check":
        if not rest or rest[0] not in CHECKS:
            raise ValueError(f"check: expected {' or '.join(CHECKS)}, found {rest[0] if rest else 'nothing'}")
        return f"qdiff check {rest[0]}", CHECKS[rest[0]], rest[1:], ""
    if name == "sample":
        return "qdiff sample", *sampling_of(rest), command.interrupted
    if command.model:
        rest = with_model(rest, general_style)
    return f"qdiff {name}", command.module, rest, command.interrupted


def shown(arguments: Sequence[str]) -> str | None:
    """What is printed in place of a command: help, the version; None where there is one to carry out."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return usage()
    if arguments[0] == "--version":
        return f"qdiff {__version__}"
    helps = {"-h", "--help"} & set(arguments[1:])
    if arguments[0] == "sample" and helps and not {"-m", "--model"} & {a.split("=")[0] for a in arguments}:
        flags = "  --steps N, --images N, --out DIR, --seed N, and the flags of the model's own script"
        return f"usage: qdiff sample -m PATH [flags]\n\n{MODEL}\n{flags}\n\nqdiff sample -m PATH --help lists them all."
    if arguments[0] == "check" and (helps and arguments[1] not in CHECKS):
        return f"usage: qdiff check {{{','.join(CHECKS)}}} [flags]"
    return None


def run(arguments: Sequence[str] | None = None) -> None:
    """The console command. A user's mistake becomes one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    text = shown(arguments)
    if text is not None:
        print(text)
        return
    from qdiff.cli.command import run_main

    interrupted = GOES_ON if arguments[0] in COMMANDS and COMMANDS[arguments[0]].interrupted else ""
    sys.argv = ["qdiff", *arguments]

    def main(_: Sequence[str] | None) -> None:
        called, module, own, _ = resolve(arguments)
        sys.argv = [called, *own]
        import_module(module).main(own)

    run_main(main, interrupted)
