"""Post-training quantization of diffusion models."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`qdiff.load`, imported when it is first used: importing the package alone stays cheap."""
    if name == "load":
        from qdiff.deploy.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
