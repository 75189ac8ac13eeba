"""Faults between versions of other libraries that users would meet through this package."""

from importlib.metadata import version

import datasets.config


def let_rows_be_tensors() -> None:
    """
    Let datasets make tensors of rows beside a torchvision without `VideoReader`.

    datasets 3 imports that class once torchvision is loaded, for any row, and fails where
    a newer torchvision has none: so do SAELens's cached activations and pretokenized data.
    It needs torchvision for videos alone.
    """
    try:
        import torchvision.io  # which TransformerLens has imported, where there is one
    except ImportError:
        return
    is_old = int(version("datasets").partition(".")[0]) < 4
    if is_old and not hasattr(torchvision.io, "VideoReader"):
        datasets.config.TORCHVISION_AVAILABLE = False
