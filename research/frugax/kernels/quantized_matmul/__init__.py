"""Products of codes, and of numbers with codes."""
