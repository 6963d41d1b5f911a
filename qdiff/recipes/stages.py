"""Frozen descriptions of a recipe's stages, and of what they hold: ranges, learning rates, objectives."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdiff.recipes.layer_names import check_pattern
from qdiff.recipes.plain_data import one_of, within

RANGE_FINDERS = ("minmax", "shrink", "theta", "percentile")  # made in qdiff.nn.ranges


@dataclass(frozen=True)
class RangeSpec:
    """How a range is found: a finder (see `qdiff.nn.ranges`), and how the ranges of several batches become one.

    `aggregate`: "first" uses the first batch alone; "ema" a moving average over batches with `momentum`, from the
    first batch on; "all" everything seen. With `prefix` "quantized" a quantizer already quantizes while later ones
    collect; with "float" all see float activations. `candidates`, `p`: of the searching finders (None: the finder's
    own). `sample`: a search looks at that many random values of each batch, besides the ends of its range (None: at all
    of them, but for "all", which keeps 16,384 of each batch).
    """

    finder: str = "minmax"
    candidates: int | None = None
    p: float | None = None
    aggregate: str = "all"
    momentum: float = 0.95
    prefix: str = "float"
    batch_size: int = 32
    sample: int | None = None

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
        if self.sample is not None:
            within("range sample", self.sample, 1, 2**40)


@dataclass(frozen=True)
class Learn:
    """One group of learned parameters: its Adam learning rate and how the rate goes ("constant" or "cosine" to 0).

    `relative`: the rate is a share of each value's own magnitude when learning starts, since scales of one network
    differ by orders of magnitude while Adam's steps do not.
    """

    rate: float
    schedule: str = "constant"
    relative: bool = False

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
class GPTQ:
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


UNIT_GROUPS = ("rounding", "scale", "bias")
FINETUNED_GROUPS = ("weight", "scale")


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
            one_of("learned parameter group", name, UNIT_GROUPS)
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


@dataclass(frozen=True)
class Finetune:
    """Stage: learn some layers' weights on frozen grids, and activation scales, with the whole network quantized.

    QuEST (arXiv 2402.03666, section 3.3): each chosen layer's output is to equal the float network's for the same
    sampling state (`local`), and so is the network's (`output`, L_G); both are weights of mean squared errors, the
    first of a sum over layers. `layers`: dotted names, shell wildcards or roles (see `qdiff.recipes.layer_names`).
    `learn`: "weight" (and bias) of those layers; "scale" of activation quantizers, which `scales` chooses: those of the
    "layers", of the "rest" (all but the time-embedding layers'), or "all". `order`: minibatches are "interleaved" over
    all steps, or each step in turn has its share of the iterations ("sequential", as released), `rounds` times over.
    `per_step`:
    how many states of each step are used, None for all.
    """

    layers: tuple[str, ...] = ("role:time",)
    learn: dict[str, Learn] = field(default_factory=lambda: {"weight": Learn(1e-5), "scale": Learn(1e-5)})
    scales: str = "layers"
    iterations: int = 1000
    batch_size: int = 8
    local: float = 1.0
    output: float = 2.0
    order: str = "interleaved"
    rounds: int = 1
    per_step: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("finetune layers: expected at least one name or pattern, found none")
        for pattern in self.layers:
            check_pattern(pattern)
        for name in self.learn:
            one_of("finetuned parameter group", name, FINETUNED_GROUPS)
        one_of("finetune scales", self.scales, ("layers", "rest", "all"))
        one_of("finetune order", self.order, ("interleaved", "sequential"))
        within("finetune iterations", self.iterations, 1, 10**9)
        within("finetune batch_size", self.batch_size, 1, 10**9)
        within("finetune rounds", self.rounds, 1, self.iterations)
        within("finetune local", self.local, 0.0, 1e6)
        within("finetune output", self.output, 0.0, 1e6)
        if self.per_step is not None:
            within("finetune per_step", self.per_step, 1, 10**9)


@dataclass(frozen=True)
class Rollout:
    """Stage: learn so that a group of denoising steps ends where the float network's does.

    AccuQuant (arXiv 2510.20348), as far as its description goes: docs/methods.md says what is our choice. The groups
    are the recipe's `step_groups`. Both networks start from the same state and take the same noise; the loss is the
    mean squared difference where the group ends. `gradient`: "two_pass", the paper's approximation, which
    drops the network's Jacobian and keeps one step's activations; "exact", a reverse sweep that keeps it, with the same
    memory; "unrolled", backpropagation through the whole group. `carry`: with "two_pass", whether the factor by which
    the sampler carries a step's error to the group's end stays (True) or is 1. `start`: a group's first state is the
    "float" trajectory's, or what the groups before have made of it ("quantized"). `order`: group after group
    ("sequential"), or a random group in every iteration ("interleaved"), which parameters that all groups share need.
    `iterations`: per group. `samples`: trajectories, None for all recorded. `keep`, `penalty`, `sharpen`:
    as in `Reconstruct`.
    """

    learn: dict[str, Learn] = field(default_factory=lambda: {"scale": Learn(4e-4, "cosine")})
    iterations: int = 100
    batch_size: int = 16
    samples: int | None = None
    gradient: str = "two_pass"
    carry: bool = True
    start: str = "float"
    order: str = "sequential"
    keep: str = "better"
    penalty: RoundingPenalty | None = None
    sharpen: float = 1.0

    def __post_init__(self) -> None:
        for name in self.learn:
            one_of("learned parameter group", name, UNIT_GROUPS)
        within("rollout iterations", self.iterations, 1, 10**9)
        within("rollout batch_size", self.batch_size, 1, 10**9)
        if self.samples is not None:
            within("rollout samples", self.samples, 1, 10**9)
        one_of("rollout gradient", self.gradient, ("two_pass", "exact", "unrolled"))
        one_of("rollout start", self.start, ("float", "quantized"))
        one_of("rollout order", self.order, ("sequential", "interleaved"))
        one_of("rollout keep", self.keep, ("always", "better"))
        within("rollout sharpen", self.sharpen, 1.0, 100.0)
        if self.order == "sequential" and set(self.learn) != {"scale"}:
            raise ValueError(
                "rollout learn: with order sequential only scale can be learned, the rest is every group's"
            )
        if self.start == "quantized" and self.order == "interleaved":
            raise ValueError("rollout start quantized: needs order sequential, since it follows the groups before")


Stage = WeightRanges | GPTQ | ActivationRanges | Reconstruct | CorrectBias | Finetune | Rollout
STAGES: dict[str, type] = {
    "weight_ranges": WeightRanges,
    "compensate": GPTQ,
    "activation_ranges": ActivationRanges,
    "reconstruct": Reconstruct,
    "correct_bias": CorrectBias,
    "finetune": Finetune,
    "rollout": Rollout,
}
