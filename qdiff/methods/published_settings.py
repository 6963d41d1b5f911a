"""The published settings, task by task, as recipes; `python -m qdiff.methods.published_settings FOLDER` writes them as
YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qdiff.methods import eda_dm, q_diffusion, quest
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe

Key = tuple[str, str, tuple[int, int]]  # method, task, bits of weights and activations

BEDROOM_RANGES = {"act_symmetric": True, "act_range": "minmax", "running_stat": True}
# What the authors' commands say (methods §1.5, §3.1) beside the bits; the rest are the methods' own defaults.
Q_DIFFUSION = {
    "cifar10": MethodOptions(family="pixel", act_symmetric=True, split=True),
    "bedroom": MethodOptions(family="latent", **BEDROOM_RANGES),
    "church": MethodOptions(family="latent"),
    "stable-diffusion": MethodOptions(
        family="text", softmax_bits=16, split=True, running_stat=True, selector_steps=25, per_step=128, batch_size=8
    ),
}
QUEST = {
    "bedroom": MethodOptions(family="latent", **BEDROOM_RANGES),
    "church": MethodOptions(family="latent"),
    "imagenet": MethodOptions(family="latent", **BEDROOM_RANGES),
    "stable-diffusion": MethodOptions(family="text", softmax_bits=16, split=True, running_stat=True),
}
EDA_DM_FAMILY = {"cifar10": "pixel", "stable-diffusion": "text"}  # the others: latent
# EDA-DM's radius, and the samples of the one batch whose features count (methods §2.2, §2.5).
RADIUS = {"cifar10": 3.0, "imagenet": 3.0, "bedroom": 0.3, "church": 0.3, "stable-diffusion": 0.3}
FEATURES = {"cifar10": 1024, "imagenet": 64, "bedroom": 64, "church": 64, "stable-diffusion": 8}
# QuEST's layers of the second finetuning, and iterations of both, over all calibration steps together (methods §3.3):
# steps x minibatches x epochs. Of Stable Diffusion's 25 steps the first has 200 epochs, 17 have 50, and 7 have 400.
CRITICAL = {
    "bedroom": (("role:attention",), 20 * 4 * 200, 20 * 16 * 20),
    "church": (("role:attention",), 20 * 4 * 200, 20 * 16 * 20),
    "imagenet": (("role:attention", "role:feed_forward"), 20 * 4 * 300, 20 * 16 * 20),
    "stable-diffusion": (("role:feed_forward",), 200 + 17 * 50 + 7 * 400, 25 * 16 * 20),
}
SAMPLERS = {
    "cifar10": "scripts/sample_diffusion_ddim.py --timesteps 100 --skip_type quad",
    "bedroom": "scripts/sample_diffusion_ldm.py -c 200 -e 1",
    "church": "scripts/sample_diffusion_ldm.py -c 500 -e 0",
    "imagenet": "scripts/sample_diffusion_ldm.py -c 20 -e 0 --scale 3",
    "stable-diffusion": "scripts/txt2img.py --plms --ddim_steps 50 --scale 7.5",
}


def published() -> dict[Key, Recipe]:
    """The recipe of every (method, task, bits) that its authors give settings for."""
    return dict(_rows())


def _rows() -> Iterator[tuple[Key, Recipe]]:
    for task, options in Q_DIFFUSION.items():
        yield ("q-diffusion", task, (4, 8)), q_diffusion.recipe(replace(options, weight_bits=4, act_bits=8))
    for task in eda_dm.PUBLISHED:
        for weight_bits in (4, 8):
            yield ("eda-dm", task, (weight_bits, 8)), _eda_dm(task, weight_bits)
    for task in QUEST:
        for act_bits in (8, 4):
            yield ("quest", task, (4, act_bits)), _quest(task, act_bits)


def _eda_dm(task: str, weight_bits: int) -> Recipe:
    options = MethodOptions(weight_bits=weight_bits, act_bits=8, family=EDA_DM_FAMILY.get(task, "latent"))
    recipe = eda_dm.recipe(options, task)
    return replace(recipe, selector=replace(recipe.selector, radius=RADIUS[task], features=FEATURES[task]))


def _quest(task: str, act_bits: int) -> Recipe:
    """Moving averages are for 8 bits alone: those of 4 have a range per channel, which the released code mixes up."""
    options = replace(QUEST[task], weight_bits=4, act_bits=act_bits)
    recipe = quest.recipe(replace(options, running_stat=options.running_stat and act_bits > 4))
    layers, time_iterations, iterations = CRITICAL[task]
    *before, time, critical = recipe.stages
    time = replace(time, iterations=time_iterations)
    critical = replace(critical, layers=layers, iterations=iterations)
    return replace(recipe, stages=(*before, time, critical))


def file_name(key: Key) -> str:
    """method-task-w4a8.yml."""
    method, task, (weight_bits, act_bits) = key
    return f"{method}-{task}-w{weight_bits}a{act_bits}.yml"


def text(key: Key, recipe: Recipe) -> str:
    """The recipe as YAML, below a comment that says which sampler it is published for."""
    sampler = SAMPLERS[key[1]]
    if key[:2] == ("q-diffusion", "church"):
        sampler = sampler.replace("-c 500", "-c 400")
    return f"# Published settings, for {sampler}\n{recipe.to_yaml()}"


def write(folder: Path) -> None:
    """Write every recipe into `folder`. Raises OSError where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, recipe in published().items():
        (folder / file_name(key)).write_text(text(key, recipe), encoding="utf8")


def main(argv: Sequence[str]) -> None:
    """Write every recipe into the folder that is the one argument; exit code 2 where there is not one."""
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.stderr.write("usage: python -m qdiff.methods.published_settings FOLDER\n")
        sys.exit(2)
    write(Path(argv[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
