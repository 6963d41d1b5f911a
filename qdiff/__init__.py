"""Post-training quantization of diffusion models.

`load_model`, `quantize` and `load` are the way in; `Recipe` and its stages say what a calibration does.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qdiff.api.models import Model, load_model
    from qdiff.api.quantize import CalibrationSettings, QuantizedModel, load, load_original, quantize
    from qdiff.calibration.selectors import CalibrationSet
    from qdiff.calibration.stages import register_stage
    from qdiff.calibration.trajectories import Trajectories, load_trajectories
    from qdiff.deploy.runtime import prepare
    from qdiff.families.options import SamplingOptions
    from qdiff.methods import MethodOptions, make_recipe, register_method
    from qdiff.recipes.recipe import QuantSpec, Recipe

# Public names and where they are: imported when they are first used, so that importing the package alone stays cheap.
_PUBLIC = {
    "Model": "qdiff.api.models",
    "load_model": "qdiff.api.models",
    "CalibrationSettings": "qdiff.api.quantize",
    "QuantizedModel": "qdiff.api.quantize",
    "load": "qdiff.api.quantize",
    "load_original": "qdiff.api.quantize",
    "quantize": "qdiff.api.quantize",
    "CalibrationSet": "qdiff.calibration.selectors",
    "register_stage": "qdiff.calibration.stages",
    "Trajectories": "qdiff.calibration.trajectories",
    "load_trajectories": "qdiff.calibration.trajectories",
    "prepare": "qdiff.deploy.runtime",
    "SamplingOptions": "qdiff.families.options",
    "MethodOptions": "qdiff.methods",
    "make_recipe": "qdiff.methods",
    "register_method": "qdiff.methods",
    "QuantSpec": "qdiff.recipes.recipe",
    "Recipe": "qdiff.recipes.recipe",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
