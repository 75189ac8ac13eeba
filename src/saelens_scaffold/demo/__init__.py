"""`saelens-scaffold demo`: scaffold SAEs and their plain twins, trained and compared."""

from saelens_scaffold.demo.main import run

__all__ = ["run"]
