"""Using an adapter: generation, and which expert spoke."""
