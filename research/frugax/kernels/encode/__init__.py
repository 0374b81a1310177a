"""The codes of a matrix whose scales are known."""
