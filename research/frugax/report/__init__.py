"""Reads finished, running and killed runs: a table and their loss curves.

`python -m frugax.report RUN...` prints one row a run and draws the curves.
Needs numpy and, for the pictures, matplotlib; not JAX.
"""

from frugax.report.curves import figure, plot, smooth
from frugax.report.runs import Run, read_run
from frugax.report.tables import table, to_json

__all__ = ('Run', 'figure', 'plot', 'read_run', 'smooth', 'table', 'to_json')
