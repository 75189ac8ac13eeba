"""Stand-ins for packages that are imported by what runs, and not used by it.

A machine that is lent for minutes, without network, has PyTorch and little else, and wheels
of all that SAELens imports would be 100 MB more: tables, plots, logging.
"""

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """A module of which every attribute is an empty class of that name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Metadata(Distribution):
    """The newest version there can be."""

    def __init__(self, name: str):
        self.of = name

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {self.of}\nVersion: 999.0\n"

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class _Finder(DistributionFinder, MetaPathFinder, Loader):
    def __init__(self, packages: Iterable[str]):
        self.packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterator[Distribution]:
        return iter([_Metadata(context.name)] if context.name in self.packages else [])


def stand_in_for_missing(packages: Iterable[str]) -> list[str]:
    """Put stand-ins in the place of the packages that are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder(missing))
    return missing
