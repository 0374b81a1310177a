"""Reads finished, running and killed runs: a table and their loss curves.

`python -m frugax.report RUN...` prints one row a run and draws one picture.
Needs numpy and, for the picture, matplotlib; not JAX.
"""

from frugax.report.curves import plot
from frugax.report.runs import Run, read_run
from frugax.report.tables import table

__all__ = ('Run', 'plot', 'read_run', 'table')
