"""Paths of the user's disk, of which only the last part is published."""

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


def without_directories(value: Any) -> Any:
    """
    A value as it may be published.

    Args:
        value: A string, or JSON data of any depth.

    Returns:
        The same with only the last part of each local path. Hub ids such as "user/model"
        stay as they are.
    """
    if isinstance(value, dict):
        return {key: without_directories(content) for key, content in value.items()}
    if isinstance(value, list):
        return [without_directories(content) for content in value]
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    if windows.drive and windows.root:
        return windows.name or value
    if value.startswith(("/", "./", "../", "~")):
        return PurePosixPath(value).name or value
    return value
