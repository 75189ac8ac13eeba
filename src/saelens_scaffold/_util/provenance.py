"""Provenance of results: versions and hardware."""

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("saelens-scaffold", "sae-lens", "sae-bench", "transformer-lens", "torch")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, if installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # SAEBench, which is an extra
            found[package] = version(package)
    return found


def hardware(device: str) -> str:
    """Name of a GPU; processor, cores and threads of a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads"
