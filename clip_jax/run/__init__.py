"""A run from its start to its end: what happens around its steps, and what guards them."""
