"""Two annotators, each calibrated on what taught the other: who sees what, and what is promised."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

from cpseg.errors import InputError
from cpseg.quantile import Level
from cpseg.training import Corrected, Example, cross_fit, refine

C = 3


def numbered(count: int, seed: int = 0, pixels: int = 5) -> list[Example]:
    """Noisy logits of random labels; the blue of an image is its number."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Example] = []
    for number in range(count):
        label = torch.randint(C, (1, pixels), generator=generator)
        image = torch.zeros(3, 1, pixels, dtype=torch.uint8)
        image[2] = number
        noise = torch.randn(C, 1, pixels, generator=generator)
        made.append((image, noise + 2 * nn.functional.one_hot(label, C).movedim(-1, 0), label))
    return made


def numbers(images: Tensor) -> list[int]:
    return [int(number) for number in images[:, 2, 0, 0]]


def as_it_is(images: Tensor, logits: Tensor) -> Tensor:
    del images
    return logits


def test_each_half_teaches_once_and_calibrates_the_other_annotator() -> None:
    taught: list[list[int]] = []
    asked: list[tuple[int, int]] = []

    def teach(known: Sequence[Example]) -> Corrected:
        taught.append([int(image[2, 0, 0]) for image, _, _ in known])
        mine = len(taught)

        def corrected(images: Tensor, logits: Tensor) -> Tensor:
            asked.extend((mine, number) for number in numbers(images))
            return logits

        return corrected

    both = cross_fit(teach, numbered(19), C, alpha=0.2)
    even, odd = list(range(0, 19, 2)), list(range(1, 19, 2))
    assert taught == [even, odd]
    assert asked == [(1, number) for number in odd] + [(2, number) for number in even]
    assert [int(side.calibration.num_units.max()) for side in both.sides] == [9, 10]
    assert [side.calibration.alpha for side in both.sides] == [0.1, 0.1]


def test_what_it_says_is_the_geometric_mean_within_both_sets_by_hand() -> None:
    examples = numbered(24, seed=1)
    factors = iter((1.0, 0.5))

    def teach(known: Sequence[Example]) -> Corrected:
        del known
        factor = next(factors)
        return lambda _, logits: factor * logits

    both = cross_fit(teach, examples, C, alpha=0.5)
    image, logits, _ = numbered(1, seed=2, pixels=400)[0]
    found = both(image[None], logits[None])[0, :, 0].T.tolist()
    limits = [side.calibration.thresholds.tolist() for side in both.sides]
    sizes = set[int]()
    for answer, said in zip(found, logits[:, 0].T, strict=True):
        means = [1.0] * C
        for factor, limit in zip((1.0, 0.5), limits, strict=True):
            shares = (factor * said.double()).softmax(0).tolist()
            inside = [p if 1 - p <= t else 0.0 for p, t in zip(shares, limit, strict=True)]
            means = [m * p**0.5 for m, p in zip(means, inside, strict=True)]
        total = sum(means)
        expected = [m / total if total else 0.0 for m in means]
        assert answer == pytest.approx(expected, abs=1e-6)
        sizes.add(sum(m > 0 for m in means))
    assert sizes >= {0, 1, 2}


@given(
    st.lists(st.sets(st.integers(0, C - 1), min_size=1), min_size=18, max_size=24),
    st.integers(0, 10),
)
def test_unpromised_is_what_too_few_images_of_a_half_show(shown: list[set[int]], seed: int) -> None:
    examples: list[Example] = []
    for classes, (image, logits, _) in zip(shown, numbered(len(shown), seed), strict=True):
        label = torch.tensor([[*classes, *[7] * (5 - len(classes))]])
        examples.append((image, logits, label))
    both = cross_fit(lambda _: as_it_is, examples, C, alpha=0.2, ignore_index=7)
    halves = shown[::2], shown[1::2]
    expected = [min(sum(c in each for each in half) for half in halves) < 9 for c in range(C)]
    assert both.unpromised.tolist() == expected


@pytest.mark.parametrize(("alpha", "least"), [(0.2, 18), (0.1, 38), (Fraction(2, 3), 4)])
def test_the_least_level_is_that_of_the_smaller_half(alpha: Level, least: int) -> None:
    both = cross_fit(lambda _: as_it_is, numbered(least), C, alpha)
    assert all(side.calibration.thresholds.isfinite().any() for side in both.sides)
    called: list[int] = []

    def teach(known: Sequence[Example]) -> Corrected:
        called.append(len(known))
        return as_it_is

    message = rf"alpha must be at least 2 / {least // 2} for {least - 1} labeled images"
    with pytest.raises(InputError, match=message):
        cross_fit(teach, numbered(least - 1), C, alpha)
    assert not called  # networks take minutes


@pytest.mark.parametrize(
    ("num_classes", "alpha", "message"),
    [(0, 0.2, "num_classes must be"), (C, 0.0, "alpha must"), (C, 1.0, "alpha must")],
)
def test_what_does_not_fit_is_refused(num_classes: int, alpha: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cross_fit(lambda _: as_it_is, numbered(18), num_classes, alpha)


def test_networks_are_taught_with_gradients_and_asked_without() -> None:
    asked: list[bool] = []

    def teach(known: Sequence[Example]) -> Corrected:
        refined = refine(nn.Conv2d(3 + C, C, 1), known, class_weights=(1.0,) * C, steps=2)

        def corrected(images: Tensor, logits: Tensor) -> Tensor:
            asked.append(torch.is_grad_enabled())
            told: Tensor = refined(images, logits)
            return told

        return corrected

    both = cross_fit(teach, numbered(18), C, alpha=0.2)
    image, logits, _ = numbered(1, seed=3)[0]
    both(image[None], logits[None])
    assert asked == [False] * 20


@pytest.mark.guarantee
def test_both_together_miss_no_more_of_a_class_than_alpha() -> None:
    """Annotators that know by heart what taught them, and err each in its own way on all else."""
    draws, alpha, chance = 400, 0.4, 1e-6
    generator = torch.Generator().manual_seed(0)
    missed = torch.zeros(2, dtype=torch.int64)
    for _ in range(draws):
        label = torch.randint(2, (19, 1, 6), generator=generator)
        label[..., 0], label[..., 1] = 0, 1  # each image shows both classes
        hard = torch.randn(19, 2, 1, 1, generator=generator)
        margin = 1 + hard + 0.5 * torch.randn(19, 2, 1, 6, generator=generator)
        shown = (128 + 25 * torch.where(label[:, None] == 0, margin, -margin)).clamp(0, 255)
        number = torch.arange(19).view(-1, 1, 1, 1).expand(-1, 1, 1, 6)
        images = torch.cat((shown, number), 1).to(torch.uint8)
        colors = iter((0, 1))

        def teach(known: Sequence[Example], colors: object = colors) -> Corrected:
            color = next(colors)  # type: ignore[call-overload]
            heart = {int(image[2, 0, 0]): said for image, _, said in known}

            def corrected(seen: Tensor, logits: Tensor) -> Tensor:
                del logits
                margins = (seen[:, color].float() - 128) / 25
                for row, number in enumerate(numbers(seen)):
                    if number in heart:
                        margins[row] = torch.where(heart[number] == 0, 20.0, -20.0)
                return torch.stack((margins, torch.zeros_like(margins)), 1)

            return corrected

        blank = torch.zeros(2, 1, 6)
        examples = [(image, blank, said) for image, said in zip(images, label, strict=True)]
        both = cross_fit(teach, examples[:-1], 2, alpha)
        left = both(images[-1:], blank[None])[0, :, 0] > 0
        for c in range(2):
            weight = torch.rand(6, generator=generator) * (label[-1, 0] == c)
            missed[c] += int(not left[c, weight.argmax()])
    for count in missed.tolist():
        assert count <= binom.ppf(1 - chance, draws, alpha)
        assert count >= binom.ppf(chance, draws, alpha / 2)  # one alone misses nearly half of it
