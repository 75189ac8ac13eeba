"""`saelens-scaffold rank`: which rank a scaffold might have, and why."""
