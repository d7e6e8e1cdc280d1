"""Looks at data: every defect, counts and rates, rows as the model sees them."""
