"""What the processes of a team do in utils/test_fabric_team.py, and what that file compares it with. As a script: a
process."""

import argparse
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddim.network import DDPMUNet
from qdiff.calibration.calibrate import Progress, RunOptions, calibrate
from qdiff.calibration.selectors import CalibrationSet
from qdiff.cli.command import run_main
from qdiff.cli.flags import add_team_flags
from qdiff.cli.parser import make_parser
from qdiff.cli.team import start_team
from qdiff.families import adapter_for
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import quant_layers
from qdiff.recipes.stages import Loss, Reconstruct

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
TIMESTEPS = torch.arange(950, 0, -100)
SMALL = MethodOptions(weight_bits=4, act_bits=8, iterations=6, act_iterations=4, batch_size=5)
SMALL = replace(SMALL, weight_range="minmax", act_range="minmax")


def recipes():
    """name -> recipe. Their stages of 3 and 5 samples a batch are split unevenly, those of 1 not at all."""
    quick = make_recipe("quick", SMALL)
    hardest = {"inputs": "mixed", "mix": 0.5, "drop": 0.5, "loss": Loss(2.0, taps=0.5), "batch_size": 3}
    stages = (replace(s, **hardest) if isinstance(s, Reconstruct) else s for s in quick.stages)
    return {
        "q-diffusion": make_recipe("q-diffusion", SMALL),
        "q-diffusion, one sample": make_recipe("q-diffusion", replace(SMALL, batch_size=1)),
        "quick": quick,
        "mixed": replace(quick, stages=tuple(stages)),
    }


class Stop(Exception):
    """Raised where a calibration is interrupted."""


class Stopping(Progress):
    """Interrupts a calibration after so many learned units."""

    def __init__(self, units):
        self.units = units

    def unit(self, report, done, total, restored=False):
        self.units -= 1
        if self.units == 0:
            raise Stop


def calibrated(recipe, dtype, team, record=None, progress=None):
    """(state of the calibrated network, its units' errors) of a tiny network on twelve states."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [8], "image_size": 8}
        network = DDPMUNet(in_channels=3, out_ch=3, dropout=0.0, **sizes).eval().requires_grad_(False).to(dtype)
        x = torch.randn(12, 3, 8, 8, dtype=torch.float64).to(dtype)
    data = CalibrationSet(x, TIMESTEPS[torch.arange(12) % 10].float(), torch.arange(12) % 10)
    options = RunOptions(team=team, record=record)
    run = calibrate(network, adapter_for("ddim"), recipe, data, 0, TIMESTEPS, progress, options=options)
    layers = {name: layer for name, layer in quant_layers(run.network).items() if layer.frozen}
    codes = {f"{name}.codes": layer.codes for name, layer in layers.items()}
    return run.network.state_dict() | codes, [report.after for report in run.reports]


@dataclass(frozen=True)
class Box:
    """A class of one's own."""

    content: object


def exchange(team):
    """What the collective calls give."""
    shared = torch.full((2, 3), float(team.rank))
    values = [torch.tensor([0, 1, team.rank]).to(dtype) for dtype in DTYPES]
    values += [torch.tensor(team.rank), torch.empty(0, 4), torch.arange(6).view(2, 3).T + team.rank]
    sums = [torch.full((2, 2), team.rank + 1.0), torch.tensor(team.rank + 1.0, dtype=torch.float64), torch.ones(3)]
    team.sum(sums)
    team.sum([])
    items = list(range(5))
    return {
        "from 0": team.broadcast({"values": values, "name": f"process {team.rank}"}),
        "from 1": team.broadcast(Box((shared, [shared, None])), owner=1),
        "sums": sums,
        "shares": [team.local_rows(torch.arange(5)), team.local_rows(torch.arange(1))],
        "gathered": team.gather([item * 10 for item in team.local_items(items)], len(items)),
        "threads": torch.get_num_threads(),
    }


def work(team, folder):
    """Everything that utils/test_fabric_team.py looks at: this process's results."""
    found = {"exchange": exchange(team)}
    found |= {name: calibrated(recipe, torch.float64, team) for name, recipe in recipes().items()}
    found["float32"] = calibrated(recipes()["quick"], torch.float32, team)
    record, recipe = folder / f"record{team.rank}", recipes()["q-diffusion"]
    for units in (4, 12):  # in the stage whose batches are split, and in the one whose units are spread
        try:
            calibrated(recipe, torch.float64, team, record, Stopping(units))
        except Stop:
            found[f"pieces after {units}"] = len(list(record.glob("*.safetensors")))
    found["resumed"] = calibrated(recipe, torch.float64, team, record)
    return found


def main(argv):
    parser = make_parser("A process of a team. In the end, or without a folder at once, process 1 fails.")
    parser.add_argument("folder", type=Path, nargs="?")
    add_team_flags(parser)
    args = argparse.Namespace(dry_run=False, **vars(parser.parse_args(argv)))
    with start_team(args, torch.device("cpu")) as team:
        if args.folder is not None:
            torch.save(work(team, args.folder), args.folder / f"{team.rank}.pt")
            team.wait()  # the failure ends the other process, which is not to be writing then
            if team.rank == 1:
                raise ValueError("--nothing: as it should be")
        elif team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        team.wait()


if __name__ == "__main__":
    run_main(main)
