"""`saelens-scaffold demo`: scaffold SAEs and their plain twins, trained and compared."""

from saelens_scaffold.demo.main import add_arguments, run

__all__ = ["add_arguments", "run"]
