"""`saelens-scaffold compare`: SAEs of a grid, trained alike and judged at matched sparsity."""
