"""Measuring: accuracy and loss per domain, experts against their base, and how tokens were routed."""
