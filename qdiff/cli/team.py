"""The team of processes that --devices and --num_nodes ask for."""

from __future__ import annotations

import argparse

import torch

from qdiff.utils import fabric_team
from qdiff.utils.errors import flags_named
from qdiff.utils.team import Team

FLAGS = {"devices": "--devices", "num_nodes": "--num_nodes", "device": "--device"}


def start_team(args: argparse.Namespace, device: torch.device) -> Team:
    """The team, to be entered; alone with a --dry_run. Raises ValueError naming the flags that do not fit."""
    if args.dry_run:
        return Team()
    with flags_named(FLAGS):
        return fabric_team.start_team(device, args.devices, args.num_nodes)
