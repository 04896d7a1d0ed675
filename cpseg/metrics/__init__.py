"""Coverage, set size, selective accuracy and mIoU: mergeable, with intervals over units.

Every number here is a ratio of counts: covered over labeled pixels, correct over kept ones,
intersection over union. A metric keeps one row of int64 counts per unit, the ratio's two parts for
each class, so a report can average both ways and its intervals can resample units:

- ``mean_of_images``: each unit's ratio, averaged over the units that have one (for a class: units
  that contain it). This is what an image-unit calibration promises, and what compares with
  ``1 - alpha``, if metric and calibration were given the same ``unit_ids``.
- ``mean_of_pixels``: counts summed over units, then divided. Large objects and units rule it.

A unit is one entry of a batch, or what ``unit_ids`` names: a patient, a scene, an image that comes
in tiles. It is what every report calls an image. Counts of one id are summed before any ratio, over
batches, merges and files, so an id must not stand for two units. Tiles that overlap count their
common pixels twice. Pixels with the ignored label do not count, and a unit without any other has no
ratio. ``update`` never waits for the device: labels that are no class are counted there, and
``compute`` refuses them. Rows are put in a canonical order before anything is averaged or
resampled, so any cut into batches and any order of merges gives the same report, to the bit.

Memory: one row of 8-byte counts per unit, whatever the number of its tiles: ``2 C + 1`` counts for
:class:`Coverage`, ``3 C + 2`` for :class:`SetSize`, ``3 K + 2`` for :class:`StratifiedCoverage` with
K strata, ``4 C + 2`` for :class:`SelectiveAccuracy` and :class:`MeanIoU`. ``compute`` draws its
resamples once for all ratios, in blocks of 32 MB (more only where one resample of all units is), and
keeps 8 bytes per resample and column, four columns per ratio and class, besides float64 copies of
the rows.
"""

from cpseg.metrics._estimates import Estimate, Ratio
from cpseg.metrics.accuracy import SelectiveAccuracy, SelectiveAccuracyReport
from cpseg.metrics.coverage import Coverage, CoverageReport, SetSize, SetSizeReport
from cpseg.metrics.iou import MeanIoU, MeanIoUReport
from cpseg.metrics.strata import (
    StratifiedCoverage,
    StratifiedCoverageReport,
    boundary_strata,
    interval_names,
    object_size_strata,
    set_size_strata,
)

__all__ = [
    "Coverage",
    "CoverageReport",
    "Estimate",
    "MeanIoU",
    "MeanIoUReport",
    "Ratio",
    "SelectiveAccuracy",
    "SelectiveAccuracyReport",
    "SetSize",
    "SetSizeReport",
    "StratifiedCoverage",
    "StratifiedCoverageReport",
    "boundary_strata",
    "interval_names",
    "object_size_strata",
    "set_size_strata",
]
