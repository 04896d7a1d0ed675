"""One HTML file about a calibration: what it promises, what happened on labeled images, what to do.

:func:`measure` walks labeled images once, and once more for those it shows; :func:`page` writes
what was found as one file without scripts that loads nothing from anywhere. Several processes take
a share of the images each, and merge their :class:`Observations`. Figures need matplotlib:
``pip install 'cpseg[plot]'``.
"""

from cpseg.report._page import page
from cpseg.report.findings import AnyFilter, Entries, Entry, Findings, Seen, Worry
from cpseg.report.observations import Observations, levels_table, measure

__all__ = [
    "AnyFilter",
    "Entries",
    "Entry",
    "Findings",
    "Observations",
    "Seen",
    "Worry",
    "levels_table",
    "measure",
    "page",
]
