"""Rotated and rounded copies of a matrix, by rows and by columns."""
