"""Frozen descriptions of what is quantized and how: grids, rules, step groups, recipes; YAML in, YAML out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qdiff.recipes.layer_names import Roles, check_pattern, matches
from qdiff.recipes.plain_data import from_plain, one_of, to_plain, within
from qdiff.recipes.stages import STAGES, Stage
from qdiff.utils.files import parse_yaml

KINDS = ("affine", "signed", "unsigned", "unsigned_mid")
AXES = ("tensor", "out_channel", "in_channel")


@dataclass(frozen=True)
class QuantSpec:
    """A uniform grid x = (code - zero_point) * scale with code in [qmin, qmax].

    `kind`: "affine" codes 0 ... 2^b - 1 with any zero point; "signed" codes -2^(b-1) ... 2^(b-1) - 1, zero point 0;
    "unsigned" codes 0 ... 2^b - 1, zero point 0 (softmax outputs); "unsigned_mid" unsigned codes with the zero point in
    the middle, or at an end for one-sided data (EDA-DM's "symmetric"). `axis`: one scale per "tensor", per
    "out_channel" (weights, axis 0) or per "in_channel" (activations: axis 1 of images, the last of tokens).
    """

    bits: int
    kind: str = "affine"
    axis: str = "tensor"

    def __post_init__(self) -> None:
        within("bits", self.bits, 2, 16)
        one_of("kind", self.kind, KINDS)
        one_of("axis", self.axis, AXES)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.kind == "signed" else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.qmin + 2**self.bits - 1


@dataclass(frozen=True)
class Rule:
    """An exception for layers whose dotted name matches `pattern`: shell wildcards, or a role as "role:input".

    `weight_bits`, `act_bits`: new width, 0 for "leave float", None for "as the recipe says". `one_set`: the layer's
    activation quantizer has one parameter set for all steps, whatever the recipe's step groups. Later rules win.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None
    one_set: bool = False

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        for name in ("weight_bits", "act_bits"):
            bits = getattr(self, name)
            if bits not in (None, 0):
                within(f"rule {self.pattern}: {name}", bits, 2, 8)

    def matches(self, name: str, roles: Roles | None = None) -> bool:
        """Whether the rule speaks of the layer called `name`."""
        return matches(self.pattern, name, roles)


@dataclass(frozen=True)
class Selector:
    """Which float sampling states calibrate: see `qdiff.calibration.selectors`.

    "uniform" takes `per_step` samples of each of `steps` steps; "group_starts" `per_step` samples of the first step of
    every step group, and of further ones inside the groups until there are about `steps` steps; "density_variety"
    (EDA-DM) `steps` x `per_step` states, each of another sample, at steps chosen by the features of `features`
    samples: a step counts neighbours within mean squared distance `radius` (None: the median over all pairs of steps)
    and adds `variety` times its dissimilarity.
    """

    name: str = "uniform"
    steps: int = 20
    per_step: int = 256
    radius: float | None = None
    variety: float = 1.0
    features: int = 64

    def __post_init__(self) -> None:
        one_of("selector", self.name, ("uniform", "density_variety", "group_starts"))
        within("selector.steps", self.steps, 1, 10**6)
        within("selector.per_step", self.per_step, 1, 10**9)
        if self.radius is not None:
            within("selector.radius", self.radius, 0.0, 1e9)
        within("selector.variety", self.variety, 0.0, 1e9)
        within("selector.features", self.features, 1, 10**9)

    @property
    def seeds(self) -> int:
        """Recorded samples that it takes."""
        return self.steps * self.per_step if self.name == "density_variety" else self.per_step


@dataclass(frozen=True)
class StepGroups:
    """Which sampler steps share activation parameters: `count` equal consecutive groups, or groups of `size` steps, the
    last one shorter.

    t between two recorded timesteps takes the set of the nearest one, or holds the last one passed on the way down
    from T. `hold_every` reproduces a fault of the released QuEST (Q1): sets change at every that many steps only, so
    that those between are never used.
    """

    count: int = 1
    lookup: str = "nearest"
    size: int | None = None
    hold_every: int | None = None

    def __post_init__(self) -> None:
        within("step_groups.count", self.count, 1, 10**6)
        one_of("step_groups lookup", self.lookup, ("nearest", "hold"))
        for name in ("size", "hold_every"):
            if getattr(self, name) is not None:
                within(f"step_groups.{name}", getattr(self, name), 1, 10**6)
        if self.size is not None and self.count != 1:
            raise ValueError(f"step_groups: expected count or size, found count {self.count} and size {self.size}")

    def sets(self, steps: int) -> int:
        """Parameter sets for a sampler of that many steps."""
        return self.count if self.size is None else -(-steps // self.size)


# Faults of the published code that change numbers; each is off unless named (B-numbers: docs/methods.md).
COMPAT = {
    "raw_min_range": "B1: affine min-max takes the scale from the raw minimum, the zero point from min(minimum, 0)",
    "first_step_ranges": "B4: activation ranges of latent models come from the first 64 states, all of one step",
    "ordered_ema": "B5: moving averages of ranges walk the states in sampling order, so late steps dominate",
    "skip_second_split": "B6: the rounding penalty leaves out the second half of split weights",
    "train_mode": "B8: dropout is active while a unit learns",
    "symmetric_softmax": "B9: softmax outputs take the activations' signed grid, of which half is never used",
    "definition_order": "units of the pixel model learn in the order of definition, its up path from up.0",
    "positional_ends": "E1: EDA-DM's 8-bit first and last layers are found by position, and are others than meant",
    "second_forward": "E5: losses of layers come from a second run of the unit, with other dropped activations",
    "backward_counts": "E7: EDA-DM's counts are rounded one by one and corrected from the last step backwards",
    "hold_every_ten": "Q1: QuEST's parameter sets change at every tenth step only",
    "sequential_steps": "Q8: QuEST's time-embedding layers learn one step after another",
}


@dataclass(frozen=True)
class Recipe:
    """All that a calibration does to a network; with the data and the seed it determines the result.

    `activations` None leaves activations float, `softmax` None gives softmax outputs the activations' treatment.
    `compat` names faults of the published code to reproduce (see `COMPAT`).
    """

    name: str
    weights: QuantSpec = QuantSpec(8, "affine", "out_channel")
    activations: QuantSpec | None = None
    softmax: QuantSpec | None = None
    split_shortcuts: bool = False
    rules: tuple[Rule, ...] = ()
    selector: Selector = Selector()
    step_groups: StepGroups = StepGroups()
    stages: tuple[Stage, ...] = ()
    compat: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        within("weights.bits", self.weights.bits, 2, 8)
        if self.weights.axis == "in_channel":
            raise ValueError("weights axis: expected tensor or out_channel, found in_channel")
        if self.activations is not None:
            within("activations.bits", self.activations.bits, 2, 8)
        if self.softmax is not None:
            within("softmax.bits", self.softmax.bits, 2, 16)
        for name in self.compat:
            one_of("compat option", name, COMPAT)

    def layer_specs(self, name: str, roles: Roles | None = None) -> tuple[QuantSpec | None, QuantSpec | None]:
        """(weight grid, input grid) of the layer called `name`, the rules applied; None means float.

        roles: the network's, which rules may name.
        """
        weights, activations = self.weights, self.activations
        for rule in self.rules:
            if rule.matches(name, roles):
                weights = _with_bits(weights, rule.weight_bits, self.weights)
                activations = _with_bits(activations, rule.act_bits, self.activations)
        return weights, activations

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists; a stage carries its name under "stage"."""
        return to_plain(self, STAGES)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises ValueError naming an unknown field, stage or value."""
        return from_plain(cls, plain, "recipe", {Stage: STAGES})

    def to_yaml(self) -> str:
        """The recipe as YAML text, ready to be edited and given back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file, or from a printed plan that holds one under `recipe`.

        Raises ValueError naming the file and what is wrong in it.
        """
        try:
            plain = parse_yaml(Path(path).read_text(encoding="utf8"))
            return cls.from_dict(plain["recipe"] if isinstance(plain, dict) and "recipe" in plain else plain)
        except (ValueError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a recipe: {' '.join(str(error).split())}") from error


def _with_bits(spec: QuantSpec | None, bits: int | None, default: QuantSpec | None) -> QuantSpec | None:
    if bits is None or default is None:
        return spec
    return dataclasses.replace(default, bits=bits) if bits else None


def softmax_spec(recipe: Recipe) -> QuantSpec:
    """The grid of softmax outputs: unsigned with zero point 0, or (B9, a fault of the original) the activations'."""
    spec = recipe.softmax or replace(recipe.activations, kind="unsigned", axis="tensor")
    if "symmetric_softmax" in recipe.compat:
        return replace(spec, kind=recipe.activations.kind)
    return spec
