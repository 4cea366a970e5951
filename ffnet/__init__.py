"""FFNet under quantization: one room for each step of the evaluation."""

from ffnet.variants import VARIANTS


def build_model(name):
    """The named FFNet in eval mode with initial weights; see `ffnet.model.build_model`."""
    from ffnet import model  # torch loads only when a network is wanted

    return model.build_model(name)


__all__ = ["VARIANTS", "build_model"]
