"""Pydantic dataclasses whose fields are described by the docstrings below them."""

import ast
import inspect
import textwrap
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

Class = TypeVar("Class")


def attribute_docstrings(cls: type) -> dict[str, str]:
    """The docstrings below a class's own attributes, each as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for item, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[item.target.id] = " ".join(following.value.value.split())
    return found


@dataclass_transform(field_specifiers=(Field,))
def documented(cls: type[Class] | None = None, **config: Any) -> Any:
    """
    Make a pydantic dataclass of a class whose attributes have docstrings.

    Titles come from the names of the fields, descriptions from the docstrings; both are
    in the JSON schema, and subclasses inherit them. (Pydantic's `use_attribute_docstrings`
    loses those of a base class.)

    Args:
        cls: The class.
        config: Pydantic's configuration, as in extra="forbid".
    """

    def decorate(cls: type[Class]) -> Any:
        docstrings = attribute_docstrings(cls)
        for name, annotation in inspect.get_annotations(cls).items():
            title = name.replace("_", " ").title()
            described = Field(title=title, description=docstrings.get(name))
            cls.__annotations__[name] = Annotated[annotation, described]
        return dataclass(config=ConfigDict(**config))(cls)  # type: ignore[typeddict-item]

    return decorate if cls is None else decorate(cls)
