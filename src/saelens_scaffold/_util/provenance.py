"""The versions that decide what comes out, for provenance."""

import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("saelens-scaffold", "sae-lens", "sae-bench", "transformer-lens", "torch")


def versions() -> dict[str, str]:
    """Of Python and of the packages, as far as they are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # SAEBench, which is an extra
            continue
    return found
