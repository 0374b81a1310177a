"""Rounding and product in one kernel."""
