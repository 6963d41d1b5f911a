"""Recipes by name: each a list of stages, no loops of their own."""

from collections.abc import Callable
from dataclasses import replace

from qdiff.methods import accuquant, eda_dm, gptq, nearest, q_diffusion, quest, quick
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe
from qdiff.recipes.stages import GPTQ, STAGES, ActivationRanges, Finetune, WeightRanges
from qdiff.utils.errors import FieldError

METHODS: dict[str, Callable[[MethodOptions], Recipe]] = {
    "nearest": nearest.recipe,
    "nearest-lp": nearest.searched,
    "gptq": gptq.recipe,
    "quick": quick.recipe,
    "q-diffusion": q_diffusion.recipe,
    "eda-dm": eda_dm.recipe,
    "quest": quest.recipe,
    "accuquant": accuquant.recipe,
}


def make_recipe(method: str, options: MethodOptions) -> Recipe:
    """The recipe of a method. Raises ValueError naming the valid methods, or an option out of bounds."""
    if method not in METHODS:
        raise FieldError("method", f": expected one of {', '.join(METHODS)}, found {method!r}")
    return METHODS[method](options)


def register_method(name: str, method: Callable[[MethodOptions], Recipe]) -> None:
    """Add a method: a function from options to a recipe. Raises ValueError for a name that another method has."""
    if METHODS.get(name, method) is not method:
        raise ValueError(f"method {name!r}: there is one of that name")
    METHODS[name] = method


def for_given_weights(recipe: Recipe) -> Recipe:
    """The recipe without what finds or learns weights: for weights that come from a checkpoint."""
    stages = []
    for stage in recipe.stages:
        if isinstance(stage, (WeightRanges, GPTQ)):
            continue
        if hasattr(stage, "learn"):
            learn = {name: rate for name, rate in stage.learn.items() if name == "scale"}
            if not learn:
                continue
            stage = replace(stage, learn=learn, **({} if isinstance(stage, Finetune) else {"penalty": None}))
        stages.append(stage)
    return replace(recipe, stages=tuple(stages))


def require_stages(recipe: Recipe) -> None:
    """Raise ValueError where the stages, in their order, cannot calibrate all that the recipe quantizes."""
    names = {kind: name for name, kind in STAGES.items()}
    kinds = [type(stage) for stage in recipe.stages]
    activations = recipe.activations is not None
    for kind in [WeightRanges] + [ActivationRanges] * activations:
        if kind not in kinds:
            raise ValueError(f"stages: expected {names[kind]} among them, found {[names[k] for k in kinds]}")
    for i, stage in enumerate(recipe.stages):
        learned = getattr(stage, "learn", {})
        needs = [WeightRanges] * (isinstance(stage, GPTQ) or not {"rounding", "weight"}.isdisjoint(learned))
        needs += [ActivationRanges] * (activations and "scale" in learned)
        for kind in needs:
            if kind not in kinds[:i]:
                raise ValueError(f"stages[{i}]: expected {names[kind]} before {names[kinds[i]]}")


__all__ = ["METHODS", "MethodOptions", "for_given_weights", "make_recipe", "register_method", "require_stages"]
