"""The CSV of sparsities, masks, budgets, and the sensitivity scan."""
