"""What tests of Q-Diffusion's files share."""

from qdiff.checkpoints.qdiffusion import published_recipe

# What a caller says about a file of ours: only whether activations are used, and nothing that contradicts it.
FLAGS = {"weight_bits": 4, "act_bits": 8, "symmetric": True, "softmax_bits": 8, "split": True}


def recipe_of(adapter, **changes):
    """The recipe that the golden case's flags describe; the pixel adapter asks no network for it."""
    return published_recipe(**{**FLAGS, **changes}, adapter=adapter, network=None)


def one_line(error, *parts):
    """Assert that an error that was raised says all in one line."""
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
