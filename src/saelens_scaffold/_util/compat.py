"""Versions of other libraries, and faults between them that users would meet here."""

from importlib.metadata import version

import datasets.config


def release(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package."""
    return tuple(int(part) for part in version(package).split(".")[:2])


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
    if release("datasets") < (4, 0) and not hasattr(torchvision.io, "VideoReader"):
        datasets.config.TORCHVISION_AVAILABLE = False
