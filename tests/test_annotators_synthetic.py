"""SyntheticAnnotator: its errors are the ones it states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cpseg.annotators import SyntheticAnnotator
from cpseg.errors import InputError

CLASSES, IMAGES = 4, 400


def labels_of(batch: int = 3, height: int = 20, width: int = 14) -> Tensor:
    """Stripes of all classes."""
    rows = torch.arange(height)[:, None] * CLASSES // height
    return rows.expand(batch, height, width).clone()


def plain(**changes: float) -> SyntheticAnnotator:
    """No noise and no bias: the argmax is the class that is shown."""
    fixed = {"noise": 0.0, "background_bias": 0.0, "image_effect": 0.0, "grain": 3.0}
    fixed |= changes
    return SyntheticAnnotator(
        num_classes=CLASSES,
        error_rate=fixed.pop("error_rate", 0.2),
        confident=fixed.pop("confident", 1.0),
        noise=fixed["noise"],
        background_bias=fixed["background_bias"],
        image_effect=fixed["image_effect"],
        grain=fixed["grain"],
        shift=fixed.get("shift", 0.0),
        temperature=fixed.get("temperature", 1.0),
        displacement=int(fixed.get("displacement", 0)),
    )


def shown(annotator: SyntheticAnnotator, labels: Tensor) -> Tensor:
    return annotator(labels, seeds=range(len(labels))).argmax(1)


def test_logits_have_the_shape_of_the_labels_with_classes_and_are_finite() -> None:
    for shape in ((2, 9), (2, 9, 7), (2, 5, 9, 7)):
        logits = SyntheticAnnotator(num_classes=3)(torch.zeros(shape, dtype=torch.uint8))
        assert logits.shape == (2, 3, *shape[1:])
        assert logits.dtype == torch.float32
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_each_class_is_mistaken_as_often_as_its_odds_say(shift: float) -> None:
    labels = labels_of(IMAGES)
    wrong = shown(plain(shift=shift), labels) != labels
    for c in range(CLASSES):
        odds = 0.25 * 2 ** (-1 + 2 * c / (CLASSES - 1)) * 2.718281828459045**shift
        rates = wrong[labels == c].reshape(IMAGES, -1).double().mean(1)
        # The images are independent: six standard errors of the mean over images.
        assert abs(float(rates.mean()) - odds / (1 + odds)) < 6 * float(rates.std()) / IMAGES**0.5


def test_a_mistaken_class_shows_the_classes_of_its_row() -> None:
    labels = labels_of(IMAGES)
    answer = shown(plain(error_rate=0.5), labels)
    seen = {(int(c), int(a)) for c, a in zip(labels.flatten(), answer.flatten(), strict=True)}
    expected = {(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (2, 0), (2, 3), (3, 0), (3, 1)}
    assert {pair for pair in seen if pair[0] != pair[1]} == expected


def test_mistakes_cluster_in_space_and_within_images() -> None:
    labels = torch.ones(IMAGES, 24, 20, dtype=torch.int64)
    annotator = SyntheticAnnotator(
        num_classes=3, noise=0.0, background_bias=0.0, image_effect=2.0, grain=6.0
    )
    wrong = (shown(annotator, labels) != labels).double()
    rate = float(wrong.mean())
    together = float((wrong[:, :, 1:] * wrong[:, :, :-1]).mean())
    assert together > 2 * rate**2
    between = float(wrong.mean((1, 2)).var())
    assert between > 5 * rate * (1 - rate) / (24 * 20)  # five times what independent pixels give


def test_some_mistakes_are_confident_and_the_others_are_in_doubt() -> None:
    labels = labels_of(IMAGES)
    logits = plain(confident=0.4)(labels, seeds=range(IMAGES))
    wrong = logits.argmax(1) != labels
    truth = logits.gather(1, labels[:, None])[:, 0][wrong]
    assert abs(float((truth == 0).double().mean()) - 0.4) < 0.05
    doubtful = truth[truth != 0]
    assert bool(((doubtful >= 2.5) & (doubtful <= 5)).all())


def test_bias_and_temperature_do_what_they_say() -> None:
    labels = labels_of()
    base = plain()(labels)
    assert torch.equal(plain(temperature=0.5)(labels), base * 2)
    expected = base.clone()
    expected[:, 0] += 1.5
    assert torch.equal(plain(background_bias=1.5)(labels), expected)


def test_displacement_moves_what_is_shown() -> None:
    labels = labels_of()
    moved = shown(plain(error_rate=0.0, displacement=2), labels)
    assert torch.equal(moved[:, 2:, 2:], labels[:, :-2, :-2])


def test_an_image_does_not_depend_on_its_batch_or_on_the_global_state() -> None:
    labels = labels_of()
    labels[1, :5] = 2
    annotator = SyntheticAnnotator(num_classes=CLASSES)
    before = torch.get_rng_state()
    whole = annotator(labels)
    assert torch.equal(torch.get_rng_state(), before)
    for i in (2, 0, 1):
        assert torch.equal(annotator(labels[i : i + 1]), whole[i : i + 1])
        assert torch.equal(
            annotator(labels[i : i + 1], seeds=[i]), annotator(labels, seeds=range(3))[i : i + 1]
        )
    assert torch.equal(whole[0], whole[2])  # equal labels, equal checksum
    seeded = annotator(labels, seeds=range(3))
    assert not torch.equal(seeded[0], seeded[2])


def test_ignored_pixels_are_shown_as_background() -> None:
    labels = labels_of()
    ignored = labels.clone()
    ignored[labels == 0] = 255
    annotator = SyntheticAnnotator(num_classes=CLASSES)
    assert torch.equal(annotator(labels, [1, 2, 3]), annotator(ignored, [1, 2, 3]))


def test_bad_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="background must be a class"):
        SyntheticAnnotator(num_classes=3, background=3)
    with pytest.raises(InputError, match="confusion must have a diagonal of 0"):
        SyntheticAnnotator(num_classes=2, confusion=((1, 0), (0, 1)))
    with pytest.raises(InputError, match="error_rate must be a probability below 1; got 1"):
        SyntheticAnnotator(num_classes=2, error_rate=1)
    with pytest.raises(InputError, match="temperature must be greater than 0"):
        SyntheticAnnotator(num_classes=2, temperature=0)
    with pytest.raises(InputError, match="seeds must hold one number per image, 2; got 1"):
        SyntheticAnnotator(num_classes=2)(torch.zeros(2, 4, 4, dtype=torch.int64), seeds=[1])
    with pytest.raises(InputError, match="labels must be an integer tensor"):
        SyntheticAnnotator(num_classes=2)(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("background", "sky", "background must be an integer"),
        ("error_rate", "a", "error_rate must be a finite number"),
        ("temperature", float("inf"), "temperature must be a finite number"),
        ("shift", float("nan"), "shift must be a finite number"),
        ("displacement", 1.5, "displacement must be an integer"),
        ("difficulty", 5, "difficulty must hold 3 numbers"),
        ("difficulty", (1, float("nan"), 1), "difficulty must hold 3 numbers"),
        ("confusion", "abc", "confusion must be 3 rows of 3 weights"),
        ("confusion", ((0, 1), (1, 0), (1, 1)), "confusion must be 3 rows of 3 weights"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(
    setting: str, value: Any, rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        SyntheticAnnotator(num_classes=3, **{setting: value})


def test_source_changes_with_every_setting() -> None:
    plain = SyntheticAnnotator(num_classes=3)
    assert plain.source == SyntheticAnnotator(num_classes=3).source
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"shift": 0.5},
        {"background": None},
        {"difficulty": (1, 1, 2)},
        {"confusion": ((0, 1, 2), (1, 0, 1), (1, 1, 0))},
        {"confusion": ((0, 2, 1), (1, 0, 1), (1, 1, 0))},
    ]
    sources = {SyntheticAnnotator(num_classes=3, **change).source for change in changes}
    assert len(sources | {plain.source}) == len(changes) + 1
