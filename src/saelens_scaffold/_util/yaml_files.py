"""YAML that users give, which may come from anywhere."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from saelens_scaffold._util.errors import UserError, one_line

MAX_CHARACTERS = 100_000
"""Most characters of a file, with its aliases written out."""

MAX_DEPTH = 20
"""Most levels of lists and mappings."""


class _Loader(yaml.SafeLoader):
    """
    Reads 1e-3 as a number, as YAML 1.2 does; to YAML 1.1 it is text.

    It refuses duplicate keys, of which PyYAML takes the last, and aliases that stand for
    more than a file may hold ("billion laughs"), before they are used.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if not is_alias:
            self._measure(node)
        elif node not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias contains itself")
        return node

    def _measure(self, node: Any) -> None:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            parts = [part for pair in parts for part in pair]
        sizes = [self._sizes[part] for part in parts]
        characters = sum(size for size, _ in sizes) or len(node.value)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        if characters > MAX_CHARACTERS:
            problem = f"its aliases stand for more than {MAX_CHARACTERS:,} characters"
            raise yaml.MarkedYAMLError(problem=problem)
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"it has more than {MAX_DEPTH} levels")
        self._sizes[node] = characters + 1, depth

    def _check_keys(self, node: yaml.MappingNode) -> None:
        # before merged mappings (<<) are added, whose keys may be there already
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                value: Any = self.construct_object(key)
                if value in seen:
                    problem = f"the key {value!r:.100} is there twice"
                    raise yaml.MarkedYAMLError(
                        problem=problem, problem_mark=key.start_mark
                    )
                seen.add(value)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> Any:
    """
    The content of a YAML file: values that JSON has, finite numbers only.

    Raises:
        UserError: It cannot be read, is not YAML, is too large, or has a key twice or
            values of another kind.
    """
    try:
        if path.stat().st_size > 4 * MAX_CHARACTERS:  # UTF-8 has 4 bytes at most
            raise UserError(f"{path} has more than {MAX_CHARACTERS:,} characters")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path} has more than {MAX_CHARACTERS:,} characters")
    loader = None
    try:
        loader = _Loader(text)  # raises for characters that YAML does not have
        content = loader.get_single_data()
    except Exception as error:  # with explicit tags PyYAML raises anything
        raise UserError(f"{path} is not YAML: {one_line(error):.300}") from error
    finally:
        if loader is not None:
            loader.dispose()
    try:  # no dates, sets, NaN, or halves of surrogate pairs, which no result can hold
        json.dumps(content, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        said = f"{path} has a value that JSON does not have: {one_line(error):.300}"
        raise UserError(said) from error
    return content
