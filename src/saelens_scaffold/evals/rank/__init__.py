"""`saelens-scaffold rank`: which rank a scaffold might have, and why."""

from saelens_scaffold.evals.rank.suggestion import suggest_rank

__all__ = ["suggest_rank"]
