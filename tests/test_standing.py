"""Which threshold rests on what."""

from math import inf

import pytest
import torch
from torch import Tensor

from cpseg import Argmax, ClassConditionalCalibrator, GroupCalibrator, SplitCalibrator
from cpseg.errors import InputError
from cpseg.filters import Top
from cpseg.risk import KeptError, RiskCalibrator
from cpseg.standing import standing, standing_table


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, 6, generator=generator)
    labels = torch.zeros(40, 6, dtype=torch.int64)
    labels[:25, :3], labels[:4, 3:5] = 1, 2
    return logits, labels


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.3])
def test_as_many_units_as_are_needed_give_a_finite_threshold_and_one_fewer_does_not(
    alpha: float,
) -> None:
    logits, labels = data()
    row = standing(SplitCalibrator().update(logits, labels).compute(alpha))[0]
    assert row.name == "everywhere"
    assert row.place == ()
    for n, finite in ((row.needed, True), (row.needed - 1, False)):
        made = SplitCalibrator().update(logits[:n], labels[:n]).compute(alpha)
        assert (standing(made)[0].rests_on == "own") == finite


def test_classes_say_their_units_and_what_stands_in_for_them() -> None:
    calibrator = ClassConditionalCalibrator(3).update(*data())
    rows = standing(calibrator.compute(0.1), ["road", "car", "pole"])
    assert [row.name for row in rows] == ["road", "car", "pole"]
    assert [row.num_units for row in rows] == [40, 25, 4]
    assert [row.num_pixels for row in rows] == [157, 75, 8]
    assert [row.rests_on for row in rows] == ["own", "own", "nothing"]
    assert [row.level for row in rows] == [0.9] * 3
    assert rows[2].threshold == inf
    assert rows[2].promise == "0.9, as it is in every set"
    pooled = standing(calibrator.compute(0.1, fallback="pooled"))
    assert [row.fallback for row in pooled] == [None, None, "pooled"]
    assert pooled[2].rests_on == "fallback"
    assert (pooled[2].level, pooled[2].promise) == (None, "nothing")
    assert pooled[2].name == "class 2"
    each = standing(calibrator.compute([0.1, 0.02, 0.3]))
    assert [row.needed for row in each] == [9, 49, 3]
    assert [row.rests_on for row in each] == ["own", "nothing", "own"]
    lines = standing_table(rows).splitlines()
    assert lines[1].startswith("pole")
    assert lines[1].endswith("5 more")
    assert len(lines) == 4


def test_groups_and_classes_are_places_of_two_numbers() -> None:
    logits, labels = data()
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    calibrator = GroupCalibrator(2, 3).update(logits, labels, groups)
    rows = standing(calibrator.compute(0.1), ["a", "b", "c"])
    assert [row.place for row in rows] == [(g, c) for g in range(2) for c in range(3)]
    assert rows[5].name == "c, group 1"
    assert standing(calibrator.compute(0.1))[5].name == "group 1, class 2"


def test_kept_labels_need_what_no_test_can_do_without() -> None:
    logits, labels = data()
    risk = KeptError(Top, 3, per_class=True)
    rows = standing(RiskCalibrator(risk).update(logits, labels).compute(0.05, 0.1))
    assert {row.needed for row in rows} == {45}
    assert {row.rests_on for row in rows} == {"nothing"}
    assert rows[0].promise == "0.95, as no label is kept"
    one = RiskCalibrator(KeptError(Argmax, 3)).update(logits, labels).compute(0.5, 0.1)
    assert len(standing(one)) == 1


def test_names_must_fit() -> None:
    calibrator = ClassConditionalCalibrator(3).update(*data())
    with pytest.raises(InputError, match="names must be one name per class, 3; got 2"):
        standing(calibrator.compute(0.1), ["a", "b"])
    with pytest.raises(InputError, match="names must be None without a class axis; got 1"):
        standing(SplitCalibrator().update(*data()).compute(0.1), ["a"])
