"""Two corrections, each calibrated on what taught the other: who sees what, and what is promised."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

from cpseg import ClassConditionalCalibrator
from cpseg.errors import InputError
from cpseg.quantile import Level
from cpseg.training import Correction, CrossFitted, Example, cross_fit, refine

C, H, W = 3, 2, 5


def numbered(numbers: range, height: int = H, width: int = W) -> list[Example]:
    """Noisy logits of random labels; the blue of an image is its number."""
    made: list[Example] = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        label = torch.randint(C, (height, width), generator=generator)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[2] = number
        noise = torch.randn(C, height, width, generator=generator)
        made.append((image, noise + 2 * nn.functional.one_hot(label, C).movedim(-1, 0), label))
    return made


def numbers_of(images: Tensor) -> list[int]:
    return [int(number) for number in images[:, 2, 0, 0]]


def as_it_is(images: Tensor, logits: Tensor) -> Tensor:
    del images
    return logits


def of_themselves(first: list[Example], second: list[Example], alpha: Level) -> CrossFitted:
    """What the annotator says, uncorrected."""
    return cross_fit(lambda _: as_it_is, first, second, alpha)


def test_each_half_teaches_once_and_calibrates_the_other_correction() -> None:
    taught: list[list[int]] = []
    asked: list[tuple[int, int]] = []

    def teach(known: Sequence[Example]) -> Correction:
        taught.append([int(image[2, 0, 0]) for image, _, _ in known])
        mine = len(taught)

        def corrected(images: Tensor, logits: Tensor) -> Tensor:
            asked.extend((mine, number) for number in numbers_of(images))
            return logits

        return corrected

    both = cross_fit(teach, numbered(range(10)), numbered(range(10, 19)), alpha=0.2)
    first, second = list(range(10)), list(range(10, 19))
    assert taught == [first, second]
    assert asked == [(1, number) for number in second] + [(2, number) for number in first]
    assert [int(calibration.num_units.max()) for calibration in both.calibrations] == [9, 10]
    assert [calibration.alpha for calibration in both.calibrations] == [0.1, 0.1]
    assert both.alpha == 0.2


@pytest.mark.parametrize(("alpha", "sizes"), [(0.2, {1, 2, 3}), (0.6, {0, 1})])
def test_what_it_says_is_the_geometric_mean_within_both_sets_by_hand(
    alpha: float, sizes: set[int]
) -> None:
    factors = iter((1.0, 0.5))

    def teach(known: Sequence[Example]) -> Correction:
        del known
        factor = next(factors)
        return lambda _, logits: factor * logits

    both = cross_fit(teach, numbered(range(12)), numbered(range(12, 24)), alpha)
    new = numbered(range(50, 52), 7, 40)
    images, logits, _ = (torch.stack(part) for part in zip(*new, strict=True))
    found = both(images, logits).movedim(1, -1).reshape(-1, C).tolist()
    limits = [calibration.thresholds.tolist() for calibration in both.calibrations]
    seen = set[int]()
    for answer, said in zip(found, logits.movedim(1, -1).reshape(-1, C), strict=True):
        means = [1.0] * C
        for factor, limit in zip((1.0, 0.5), limits, strict=True):
            shares = (factor * said.double()).softmax(0).tolist()
            inside = [p if 1 - p <= t else 0.0 for p, t in zip(shares, limit, strict=True)]
            means = [m * p**0.5 for m, p in zip(means, inside, strict=True)]
        total = sum(means)
        expected = [m / total if total else 0.0 for m in means]
        assert answer == pytest.approx(expected, abs=1e-6)
        seen.add(sum(m > 0 for m in means))
    assert seen == sizes


def test_every_labeled_pixel_of_images_of_any_size_calibrates() -> None:
    """All are sure of class 0 but in one pixel of each image, where its truth is all but out."""
    halves: list[list[Example]] = []
    for start in (0, 9):
        half: list[Example] = []
        for index, (height, width) in enumerate([(2, 5), (4, 3), (1, 2)] * 3, start):
            logits = torch.tensor([9.0, 0.0]).view(2, 1, 1).expand(2, height, width).clone()
            label = torch.zeros(height, width, dtype=torch.int64)
            place = divmod(index % (height * width), width)
            label[place] = 1
            half.append((torch.zeros(3, height, width, dtype=torch.uint8), logits, label))
        halves.append(half)
    both = of_themselves(halves[0], halves[1], 0.2)
    share = float(torch.tensor([9.0, 0.0]).softmax(0)[1])
    for calibration in both.calibrations:
        assert calibration.num_units.tolist() == [9, 9]
        assert calibration.thresholds[1] == pytest.approx(1 - share, abs=1e-3)


@given(
    st.lists(st.sets(st.integers(0, C - 1), min_size=1), min_size=9, max_size=12),
    st.lists(st.sets(st.integers(0, C - 1), min_size=1), min_size=9, max_size=12),
)
def test_unpromised_is_what_too_few_images_of_a_half_show(
    first: list[set[int]], second: list[set[int]]
) -> None:
    halves: list[list[Example]] = []
    for shown in (first, second):
        half: list[Example] = []
        for classes, (image, logits, _) in zip(shown, numbered(range(len(shown)), 1), strict=True):
            label = torch.tensor([[*classes, *[7] * (W - len(classes))]])
            half.append((image, logits, label))
        halves.append(half)
    both = cross_fit(lambda _: as_it_is, halves[0], halves[1], 0.2, ignore_index=7)
    counts = [[sum(c in each for each in shown) for c in range(C)] for shown in (first, second)]
    none = [min(of_class) < 9 for of_class in zip(*counts, strict=True)]
    assert both.unpromised.tolist() == none
    told = both.guarantee
    rest = [n for shown in counts for c, n in enumerate(shown) if not none[c] or all(none)]
    assert told.n == (min(rest), max(rest))
    named = ", ".join(str(c) for c in range(C) if none[c])
    assert (f"Nothing is promised for: {named};" in str(told)) == any(none)
    assert "is at most 0.2, in expectation over the labeled images and the new one" in str(told)
    assert told.level == 0.8


@pytest.mark.parametrize(
    ("alpha", "least"), [(0.2, 9), (0.1, 19), (Fraction(2, 3), 2), (2 / 24, 24), (0.999, 2)]
)
def test_the_least_half_is_what_the_level_takes(alpha: Level, least: int) -> None:
    whole, few = numbered(range(least)), numbered(range(least - 1))
    both = of_themselves(whole, whole, alpha)
    assert all(bool(calibration.thresholds.isfinite().any()) for calibration in both.calibrations)
    called: list[int] = []

    def teach(known: Sequence[Example]) -> Correction:
        called.append(len(known))
        return as_it_is

    void = [(image, logits, torch.full((H, W), 255)) for image, logits, _ in whole[:1]]
    for name, halves in (
        ("first", (few, whole)),
        ("second", (whole, few)),
        ("second", (whole, few + void)),
    ):
        message = (
            rf"{name} must hold at least 2 / alpha - 1 = {least} labeled units; got {least - 1}"
        )
        with pytest.raises(InputError, match=message):
            cross_fit(teach, *halves, alpha)
    assert not called  # it takes minutes


def test_images_of_a_unit_count_as_one() -> None:
    first, second = numbered(range(18)), numbered(range(18, 36))
    patients = [index // 2 for index in range(18)], [9 + index // 2 for index in range(18)]
    both = cross_fit(lambda _: as_it_is, first, second, 0.2, unit_ids=patients)
    expected = ClassConditionalCalibrator(C)
    for start in range(0, 18, 2):
        pair = [torch.stack(part) for part in zip(*second[start : start + 2], strict=True)]
        expected.update(pair[1], pair[2], [start, start])
    found = both.calibrations[0]
    assert found.num_units.tolist() == [9] * C
    assert torch.equal(found.thresholds, expected.compute(0.1).thresholds)
    alone = cross_fit(lambda _: as_it_is, first, second, 0.2)
    assert not torch.equal(alone.calibrations[0].thresholds, found.thresholds)
    for ids, message in (
        ((patients[0], patients[1][:-1]), "unit_ids must have 18 and 18 ids"),
        ((patients[0], [8, *patients[1][1:]]), "no unit may be in both halves; got 8"),
        (
            ([0] * 18, patients[1]),
            "first must hold at least 2 / alpha - 1 = 9 labeled units; got 1",
        ),
        ((["a"] * 18, patients[1]), "unit_ids must be"),
    ):
        with pytest.raises(InputError, match=message):
            cross_fit(lambda _: as_it_is, first, second, 0.2, unit_ids=ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alpha", "ignore_index", "change", "message"),
    [
        (0.0, 255, None, "alpha must"),
        (1.0, 255, None, "alpha must"),
        (0.2, 2, None, "ignore_index must lie outside"),
        (0.2, 255, (0, torch.zeros(3, H, W)), "examples must be bytes"),
        (0.2, 255, (1, torch.zeros(C + 1, H, W)), "examples must have logits of 3 classes; got 4"),
        (0.2, 255, (2, torch.full((H, W), C)), "labels must be classes below 3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_taught(
    alpha: float, ignore_index: int, change: tuple[int, Tensor] | None, message: str
) -> None:
    def teach(known: Sequence[Example]) -> Correction:
        raise AssertionError(known)

    first, second = numbered(range(9)), numbered(range(9))
    if change is not None:
        parts = list(second[-1])
        parts[change[0]] = change[1]
        second[-1] = (parts[0], parts[1], parts[2])
    with pytest.raises(InputError, match=message):
        cross_fit(teach, first, second, alpha, ignore_index=ignore_index)


def taught(known: Sequence[Example]) -> Correction:
    return refine(nn.Conv2d(3 + C, C, 1), known, class_weights=(1.0,) * C, steps=2)


def test_networks_are_taught_with_gradients_and_asked_without() -> None:
    asked: list[bool] = []

    def teach(known: Sequence[Example]) -> Correction:
        refined = taught(known)

        def corrected(images: Tensor, logits: Tensor) -> Tensor:
            asked.append(torch.is_grad_enabled())
            return refined(images, logits)

        return corrected

    half = numbered(range(9))
    both = cross_fit(teach, half, half, alpha=0.2)
    image, logits, _ = half[0]
    both(image[None], logits[None])
    assert asked == [False] * 20


def test_corrections_that_learned_from_both_halves_are_refused() -> None:
    half = numbered(range(9))
    once = taught(half)
    with pytest.raises(InputError, match="must begin anew each time"):
        cross_fit(lambda _: once, half, half, alpha=0.2)
    network = nn.Conv2d(3 + C, C, 1)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor, logits: Tensor) -> Tensor:
            return as_it_is(images, logits)

    with pytest.raises(InputError, match="must begin anew each time"):
        cross_fit(lambda _: Wrapped().eval(), half, half, alpha=0.2)
    with pytest.raises(InputError, match="evaluation mode"):
        cross_fit(lambda _: Wrapped(), half, half, alpha=0.2)


@pytest.mark.guarantee
def test_both_together_miss_no_more_of_a_class_than_alpha() -> None:
    """Corrections that know by heart what taught them, and err each in its own way on all else."""
    draws, alpha, chance = 400, 0.4, 1e-6
    generator = torch.Generator().manual_seed(0)
    missed, shown = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for _ in range(draws):
        label = torch.randint(2, (25, 2, 3), generator=generator)
        label[torch.rand(25, generator=generator) < 0.2] = 0  # not every image shows both classes
        hard = torch.randn(25, 2, 1, 1, generator=generator)
        margin = 1 + hard + 0.5 * torch.randn(25, 2, 2, 3, generator=generator)
        seen = (128 + 25 * torch.where(label[:, None] == 0, margin, -margin)).clamp(0, 255)
        number = torch.arange(25).view(-1, 1, 1, 1).expand(-1, 1, 2, 3)
        images = torch.cat((seen, number), 1).to(torch.uint8)
        colors = iter((0, 1))

        def teach(known: Sequence[Example], colors: object = colors) -> Correction:
            color = next(colors)  # type: ignore[call-overload]
            heart = {int(image[2, 0, 0]): said for image, _, said in known}

            def corrected(new: Tensor, logits: Tensor) -> Tensor:
                del logits
                margins = (new[:, color].float() - 128) / 25
                for row, number in enumerate(numbers_of(new)):
                    if number in heart:
                        margins[row] = torch.where(heart[number] == 0, 20.0, -20.0)
                return torch.stack((margins, torch.zeros_like(margins)), 1)

            return corrected

        blank = torch.zeros(2, 2, 3)
        examples = [(image, blank, said) for image, said in zip(images, label, strict=True)]
        both = cross_fit(teach, examples[:12], examples[12:-1], alpha)
        left = both(images[-1:], blank[None])[0] > 0
        for c in range(2):
            if both.unpromised[c] or not (label[-1] == c).any():
                continue
            pixel = (torch.rand(2, 3, generator=generator) * (label[-1] == c)).argmax()
            missed[c] += int(not left[c].flatten()[pixel])
            shown[c] += 1
    for count, of in zip(missed.tolist(), shown.tolist(), strict=True):
        assert count <= binom.ppf(1 - chance, of, alpha)
        assert count >= binom.ppf(chance, of, alpha / 2)  # one alone misses nearly half of it
    assert 0.7 * draws < min(shown.tolist()) < draws  # the rest shows none of the class
