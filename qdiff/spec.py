"""Frozen descriptions of what is quantized and how: grids, ranges, rules, stages, recipes; YAML in, YAML out."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qdiff.plain import from_plain, one_of, to_plain, within

KINDS = ("affine", "signed", "unsigned", "unsigned_mid")
AXES = ("tensor", "out_channel", "in_channel")
RANGE_FINDERS = ("minmax", "shrink", "theta", "percentile")  # made in qdiff.ranges


@dataclass(frozen=True)
class QuantSpec:
    """A uniform grid x = (code - zero_point) * scale with code in [lo, hi].

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
    def lo(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.kind == "signed" else 0

    @property
    def hi(self) -> int:
        """Largest code."""
        return self.lo + 2**self.bits - 1


@dataclass(frozen=True)
class RangeSpec:
    """How a range is found: a finder (see `qdiff.ranges`), and how the ranges of several batches become one.

    `aggregate`: "first" uses the first batch alone; "ema" a moving average over batches with `momentum`, from the
    first batch on; "all" everything seen. With `prefix` "quantized" a quantizer already quantizes while later ones
    collect; with "float" all see float activations. `candidates`, `p`: of the searching finders (None: the finder's
    own).
    """

    finder: str = "minmax"
    candidates: int | None = None
    p: float | None = None
    aggregate: str = "all"
    momentum: float = 0.95
    prefix: str = "float"
    batch_size: int = 32

    def __post_init__(self) -> None:
        one_of("range finder", self.finder, RANGE_FINDERS)
        one_of("range aggregate", self.aggregate, ("first", "ema", "all"))
        one_of("range prefix", self.prefix, ("quantized", "float"))
        within("range momentum", self.momentum, 0.0, 1.0)
        if self.p is not None:
            within("range p", self.p, 0.1, 10.0)
        within("range batch_size", self.batch_size, 1, 2**20)
        if self.candidates is not None:
            within("range candidates", self.candidates, 1, 1000)


@dataclass(frozen=True)
class Rule:
    """An exception to the recipe's bit widths for layers whose dotted name matches `pattern` (shell wildcards).

    `weight_bits`, `act_bits`: new width, 0 for "leave float", None for "as the recipe says". Later rules win.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            bits = getattr(self, name)
            if bits not in (None, 0):
                within(f"rule {self.pattern}: {name}", bits, 2, 8)

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the layer called `name`."""
        return fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Selector:
    """Which float sampling states calibrate: see `qdiff.calibration.selectors`."""

    name: str = "uniform"
    steps: int = 20
    per_step: int = 256

    def __post_init__(self) -> None:
        one_of("selector", self.name, ("uniform",))
        within("selector steps (--cali_st)", self.steps, 1, 10**6)
        within("selector per_step (--cali_n)", self.per_step, 1, 10**9)


@dataclass(frozen=True)
class StepGroups:
    """Which sampler steps share activation parameters: `count` equal consecutive groups; t between two recorded
    timesteps takes the set of the nearest one, or holds the last one passed on the way down from T."""

    count: int = 1
    lookup: str = "nearest"

    def __post_init__(self) -> None:
        within("step_groups count", self.count, 1, 10**6)
        one_of("step_groups lookup", self.lookup, ("nearest", "hold"))


@dataclass(frozen=True)
class Learn:
    """One group of learned parameters: its Adam learning rate and how the rate goes ("constant" or "cosine" to 0)."""

    rate: float
    schedule: str = "constant"

    def __post_init__(self) -> None:
        within("learning rate", self.rate, 0.0, 1e3)
        one_of("learning-rate schedule", self.schedule, ("constant", "cosine"))


@dataclass(frozen=True)
class Loss:
    """A unit's objective: L_p of its output, plus `taps` times the L_p of each of its layers but the last.

    L_p(y, y*) = mean over all axes but axis 1 of sum over axis 1 of |y - y*|^p (methods of this field; `reduction`
    "mean" averages over axis 1 too).
    """

    p: float = 2.0
    taps: float = 0.0
    reduction: str = "channel_sum"

    def __post_init__(self) -> None:
        within("loss p", self.p, 0.1, 10.0)
        within("loss taps", self.taps, 0.0, 1e6)
        one_of("loss reduction", self.reduction, ("channel_sum", "mean"))


@dataclass(frozen=True)
class RoundingPenalty:
    """AdaRound's regulariser weight * sum(1 - |2h - 1|^beta) (arXiv 2004.10568 eq. 24), off for the first `warmup`
    share of the iterations, then beta falls linearly from `beta_start` to `beta_end`."""

    weight: float = 0.01
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0

    def __post_init__(self) -> None:
        within("penalty weight", self.weight, 0.0, 1e6)
        within("penalty warmup", self.warmup, 0.0, 1.0)
        within("penalty beta_start", self.beta_start, 0.1, 1e3)
        within("penalty beta_end", self.beta_end, 0.1, 1e3)


@dataclass(frozen=True)
class WeightRanges:
    """Stage: find every weight scale and zero point, and round to nearest."""

    range: RangeSpec = RangeSpec("shrink")


@dataclass(frozen=True)
class Compensate:
    """Stage: error-compensated rounding, layer by layer in execution order (GPTQ, arXiv 2210.17323)."""

    damping: float = 0.01
    rows: int = 4000
    block: int = 128
    batch_size: int = 16

    def __post_init__(self) -> None:
        within("compensate damping", self.damping, 1e-9, 1e3)
        within("compensate rows", self.rows, 1, 10**9)
        within("compensate block", self.block, 1, 10**6)
        within("compensate batch_size", self.batch_size, 1, 2**20)


@dataclass(frozen=True)
class ActivationRanges:
    """Stage: find the scale and zero point of every activation quantizer.

    `inputs`: which calibration states are used: "all" of them or `samples` drawn at random ("random") or spread
    evenly over the steps ("stratified") or the "first" ones, which are states of one step.
    """

    range: RangeSpec = RangeSpec()
    softmax: RangeSpec | None = None
    inputs: str = "all"
    samples: int = 64

    def __post_init__(self) -> None:
        one_of("activation_ranges inputs", self.inputs, ("all", "random", "stratified", "first"))
        within("activation_ranges samples", self.samples, 1, 10**9)


@dataclass(frozen=True)
class Reconstruct:
    """Stage: learn, unit by unit, so that a unit's output equals the float unit's.

    `learn`: parameter group ("rounding", "scale", "bias") -> rate. `inputs`: the unit's inputs come from the "float"
    or the "quantized" prefix, or are "mixed" element by element with probability `mix` of the quantized one. `drop`:
    probability that an activation stays float while learning (QDrop, arXiv 2203.05740). `keep`: "always", or "better"
    to keep the result only where it lowers the unit's error. `sharpen`: exponent that moves soft rounding's start
    towards the codes already found, 1 for AdaRound's own start: a short stage that starts from compensated rounding
    would otherwise first undo it.
    """

    learn: dict[str, Learn] = field(default_factory=lambda: {"rounding": Learn(1e-3)})
    iterations: int = 20000
    batch_size: int = 32
    inputs: str = "quantized"
    mix: float = 0.5
    drop: float = 0.0
    loss: Loss = Loss()
    penalty: RoundingPenalty | None = None
    keep: str = "always"
    sharpen: float = 1.0

    def __post_init__(self) -> None:
        for name in self.learn:
            one_of("learned parameter group", name, ("rounding", "scale", "bias"))
        within("reconstruct iterations", self.iterations, 1, 10**9)
        within("reconstruct batch_size", self.batch_size, 1, 10**9)
        one_of("reconstruct inputs", self.inputs, ("float", "quantized", "mixed"))
        within("reconstruct mix", self.mix, 0.0, 1.0)
        within("reconstruct drop", self.drop, 0.0, 1.0)
        within("reconstruct sharpen", self.sharpen, 1.0, 100.0)
        one_of("reconstruct keep", self.keep, ("always", "better"))


@dataclass(frozen=True)
class CorrectBias:
    """Stage: take the mean error of each unit's output, per channel, out of the bias of its last layer.

    Empirical bias correction (arXiv 1906.04721, section 4.2). A constant error is small beside a unit's noise and so
    hardly learned, but sampling adds it up over all steps.
    """

    batch_size: int = 16

    def __post_init__(self) -> None:
        within("correct_bias batch_size", self.batch_size, 1, 2**20)


Stage = WeightRanges | Compensate | ActivationRanges | Reconstruct | CorrectBias
STAGES: dict[str, type] = {
    "weight_ranges": WeightRanges,
    "compensate": Compensate,
    "activation_ranges": ActivationRanges,
    "reconstruct": Reconstruct,
    "correct_bias": CorrectBias,
}
# Faults of the published code that change numbers; each is off unless named (B-numbers: docs/methods.md).
COMPAT = {
    "raw_min_range": "B1: affine min-max takes the scale from the raw minimum, the zero point from min(minimum, 0)",
    "first_step_ranges": "B4: activation ranges of latent models come from the first 64 states, all of one step",
    "ordered_ema": "B5: moving averages of ranges walk the states in sampling order, so late steps dominate",
    "skip_second_split": "B6: the rounding penalty leaves out the second half of split weights",
    "train_mode": "B8: dropout is active while a unit learns",
    "symmetric_softmax": "B9: softmax outputs take the activations' signed grid, of which half is never used",
    "definition_order": "units of the pixel model learn in the order of definition, its up path from up.0",
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
        within("weight bits (--weight_bit)", self.weights.bits, 2, 8)
        if self.weights.axis == "in_channel":
            raise ValueError("weights axis: expected tensor or out_channel, found in_channel")
        if self.activations is not None:
            within("activation bits (--act_bit)", self.activations.bits, 2, 8)
        if self.softmax is not None:
            within("softmax bits (--sm_abit)", self.softmax.bits, 2, 16)
        for name in self.compat:
            one_of("compat option", name, COMPAT)

    def layer_specs(self, name: str) -> tuple[QuantSpec | None, QuantSpec | None]:
        """(weight grid, input grid) of the layer called `name`, the rules applied; None means float."""
        weights, activations = self.weights, self.activations
        for rule in self.rules:
            if rule.matches(name):
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
            plain = yaml.safe_load(Path(path).read_text(encoding="utf8"))
            return cls.from_dict(plain["recipe"] if isinstance(plain, dict) and "recipe" in plain else plain)
        except (ValueError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: not a recipe: {' '.join(str(error).split())}") from error


def _with_bits(spec: QuantSpec | None, bits: int | None, default: QuantSpec | None) -> QuantSpec | None:
    if bits is None or default is None:
        return spec
    return dataclasses.replace(default, bits=bits) if bits else None
