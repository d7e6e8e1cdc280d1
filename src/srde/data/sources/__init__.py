"""Where data come from: the registry of known data sets, the user's own entries, and what turns their records into rows."""
