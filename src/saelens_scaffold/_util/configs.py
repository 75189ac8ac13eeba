"""Pydantic dataclasses: described by the docstrings of their fields, and made from input."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from saelens_scaffold._util.errors import UserError, shown

_MAX_PROBLEMS = 5

Class = TypeVar("Class")


def attribute_docstrings(cls: type) -> dict[str, str]:
    """The docstrings below a class's own attributes, each as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = definition.body  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    for pair in zip(body, body[1:], strict=False):
        match pair:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split())
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


def validating(config_class: type) -> type:
    """The class itself, or one that checks its fields (SAEBench's MDL has a plain one)."""
    if is_pydantic_dataclass(config_class):
        return config_class
    checking: Any = dataclass(config_class)
    return checking


def config_fields(config_class: type) -> dict[str, FieldInfo]:
    """The fields of a configuration that can be set."""
    return vars(config_class)["__pydantic_fields__"]


def make_config(config_class: type, values: Mapping[str, Any]) -> Any:
    """
    Make a configuration.

    Args:
        config_class: A pydantic dataclass.
        values: Fields without their default values.

    Raises:
        UserError: A field cannot have its value.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        found = error.errors()
        problems = [_problem(problem) for problem in found[:_MAX_PROBLEMS]]
        if len(found) > _MAX_PROBLEMS:
            problems.append(f"and {len(found) - _MAX_PROBLEMS:,} more")
        raise UserError("; ".join(problems)) from error
    except AssertionError as error:
        said = f"{config_class.__name__} cannot be {shown(dict(values))}: {error}"
        raise UserError(said) from error


def _problem(problem: ErrorDetails) -> str:
    if not problem["loc"]:  # what the class itself says, which tells the value
        return problem["msg"].removeprefix("Value error, ")
    field = ".".join(f"{part!s:.60}" for part in problem["loc"])
    return f"{field} is {shown(problem['input'])}: {problem['msg']}"
