"""The four students of the comparison: the same but for the labels of the unlabeled images."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpseg.errors import InputError
from cpseg.training import Comparison, Relabeled, biased_annotator, compare_on_shapes

TINY = Comparison(labeled_images=20, unlabeled_images=4, test_images=2, size=(24, 24), steps=3)
NAMES = ["labels only", "raw", "filtered", "filtered, then self-reliance"]


def test_four_students_report_their_progress_and_their_labels() -> None:
    told: list[tuple[str, int]] = []
    results = list(compare_on_shapes(TINY, progress=lambda name, step: told.append((name, step))))
    assert [result.name for result in results] == NAMES
    assert told == [(name, step) for name in NAMES for step in (1, 2, 3)]
    assert all(0 <= result.miou <= 1 for result in results)
    assert [result.kept for result in results[:2]] == [0, 1]
    assert math.isnan(results[0].right)
    assert results[1].right != results[2].right == results[3].right
    assert 0 < results[2].kept == results[3].kept
    assert list(compare_on_shapes(TINY))[1:] == results[1:]  # chance is settled by the seed


def test_runs_are_kept_where_asked_and_looking_on_the_way_changes_nothing(tmp_path: Path) -> None:
    plain = list(compare_on_shapes(TINY))
    watched = list(compare_on_shapes(replace(TINY, evaluate_every=1), directory=tmp_path))
    assert watched[1:] == plain[1:]
    assert watched[0].miou == plain[0].miou
    for name, result in zip(NAMES, watched, strict=True):
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        found = [line["miou"] for line in lines if "miou" in line]
        assert len(found) == 3
        assert found[-1] == result.miou


def test_too_few_images_for_the_level_leave_nothing_to_learn_from() -> None:
    few = Comparison(labeled_images=18, unlabeled_images=3, test_images=2, size=(24, 24), steps=3)
    filtered = list(compare_on_shapes(few))[2]
    assert filtered.kept == 0  # 1 / .05 - 1 = 19 images are the least
    assert math.isnan(filtered.right)


def test_the_annotator_is_background_biased_and_over_confident() -> None:
    labels = torch.randint(1, 6, (2, 24, 24), generator=torch.Generator().manual_seed(0))
    probabilities = biased_annotator()(labels, seeds=[0, 1]).softmax(1)
    assert float((probabilities.argmax(1) == 0).float().mean()) > 0.5
    assert float(probabilities.amax(1).mean()) > float(
        (probabilities.argmax(1) == labels).float().mean()
    )


def test_other_labels_must_be_one_per_image() -> None:
    with pytest.raises(InputError, match="labels must hold one map per image, 1; got 2"):
        Relabeled([(torch.zeros(3, 2, 2), torch.zeros(2, 2))], [torch.zeros(2, 2)] * 2)
    with pytest.raises(InputError, match="steps must"):
        Comparison(steps=2)
