"""Command lines from dataclasses whose attribute docstrings are the help.

Simple-parsing, which SAELens uses, has the same idea, but neither choices of a
`Literal | None` nor plain flags, and loses the docstring below a field that takes
more than one line.
"""

import argparse
import ast
import inspect
import textwrap
import typing
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, Literal, NoReturn


def positive(text: str) -> int:
    """
    Read a count.

    Raises:
        ArgumentTypeError: It is not an integer above 0.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1, got {text!r}"
        )
    return int(text)


Count = Annotated[int, positive]
"""An int of at least 1."""


def option(
    default: Any = MISSING, *flags: str, kw_only: bool = False, **keywords: Any
) -> Any:
    """
    A dataclass field with more than a type, a default and a docstring.

    Args:
        default: Its default. A field without one is required.
        flags: Its flags; --NAME if there are none.
        kw_only: Whether a field without a default is an option, not positional.
        keywords: Further arguments of `add_argument`.
    """
    metadata = {"flags": flags, "keywords": keywords}
    return field(default=default, kw_only=kw_only, metadata=metadata)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, prog: str, text: str):
        """
        Args:
            prog: The command.
            text: Its description, which may end with a paragraph that begins with
                "example" and goes below the options.
        """
        description, example, commands = inspect.cleandoc(text).partition("\nexample")
        super().__init__(prog, None, description, example.lstrip() + commands)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser_of(options: type, prog: str) -> CommandParser:
    """
    A parser for a dataclass.

    Each field with a docstring is an option, or, if it has no default and is not
    keyword-only, a positional argument.
    """
    parser = CommandParser(prog, options.__doc__ or "")
    types = typing.get_type_hints(options, include_extras=True)
    descriptions = _attribute_docstrings(options)
    for each in fields(options):
        if each.name in descriptions:
            _add(parser, each, types[each.name], descriptions[each.name])
    return parser


def _add(parser: CommandParser, each: Field[Any], type_: Any, text: str) -> None:
    keywords = {**_keywords(type_), **each.metadata.get("keywords", {})}
    if "type" in keywords:
        number = keywords["type"] in (int, positive)
        metavar = "N" if number else each.name.rpartition("_")[2].upper()
        keywords.setdefault("metavar", metavar)
    text = text.replace("%", "%%")
    required = each.default is MISSING
    if required and not each.kw_only:
        parser.add_argument(each.name, help=text, **keywords)
        return
    default = None if required else each.default
    if default is not None and default is not False:
        text = f"{text.removesuffix('.')} (default: %(default)s)."
    keywords |= {"dest": each.name, "required": required, "default": default}
    flags = each.metadata.get("flags") or (f"--{each.name}",)
    parser.add_argument(*flags, help=text, **keywords)


def _keywords(type_: Any) -> dict[str, Any]:
    """Keywords of `add_argument` for values of a type."""
    if type_ is bool:
        return {"action": "store_true"}
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if type(None) in arguments:
        return _keywords(arguments[0])
    if origin is list:
        return {"nargs": "+", **_keywords(arguments[0])}
    if origin is Literal:
        return {"choices": arguments}
    if origin is Annotated:
        return {"type": arguments[1]}
    return {"type": type_}


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Docstrings below the attributes of a class and its bases, each as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body  # type: ignore[attr-defined]
        for pair in zip(body, body[1:], strict=False):
            match pair:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found
