"""Scores fitted on a split of their own: their formulas, their promises, and what is refused."""

from functools import partial
from math import exp, inf
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    Argmax,
    Calibration,
    ClassConditionalCalibrator,
    PixelSetPredictor,
    SplitCalibrator,
    TopK,
)
from cpseg.errors import InputError
from cpseg.fitted import PAS, RC3P, Recalibrated, recalibrate
from cpseg.protocols import Score

C = 4
RANKS = RC3P((2, 4, 1, 3), APS())
PRIOR = PAS((0.5, 0.25, 0.2, 0.05))
WARM = Recalibrated(1.7, (0.5, -0.25, 0.0, 1.0), APS())
SCORES: list[Score] = [RANKS, RC3P((1, 2, 3, 4)), PRIOR, WARM, Recalibrated(0.5, (0.0,) * C)]


def scene(seed: int, shape: tuple[int, ...] = (3, 5, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, *space = shape
    logits = 3 * torch.randn(batch, C, *space, generator=generator)
    return logits, torch.randint(C, shape, generator=generator)


def slow(score: Score, x: list[float]) -> list[float]:
    """The scores of one pixel, from their definitions."""
    if isinstance(score, Recalibrated):
        warm = [value / score.temperature + b for value, b in zip(x, score.bias, strict=True)]
        return slow(score.score, warm)
    total = sum(map(exp, x))
    p = [exp(value) / total for value in x]
    ranks = [1 + sum(q > p[c] for q in p) for c in range(C)]
    if isinstance(score, PAS):
        return [prior / (prior + q) for prior, q in zip(score.prior, p, strict=True)]
    if isinstance(score, RC3P):
        inner = slow(score.score, x)
        return [inner[c] if ranks[c] <= score.ranks[c] else inf for c in range(C)]
    if isinstance(score, APS):
        return [sum(q for q in p if q >= p[c]) for c in range(C)]
    return [1 - q for q in p]


@pytest.mark.parametrize("score", SCORES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_fitted_score_keeps_the_contract_of_scores(score: Score, dtype: torch.dtype) -> None:
    logits, labels = scene(0)
    logits = logits.to(dtype)
    every = score(logits)
    of_labels = score.of_labels(logits, labels)
    assert every.dtype == of_labels.dtype == torch.promote_types(dtype, torch.float32)
    own = every.gather(1, labels[:, None])[:, 0]
    assert torch.equal(own.isinf(), of_labels.isinf())
    inside = own.isfinite()
    assert float((own - of_labels)[inside].abs().max()) <= score.tolerance(C)
    columns = logits.double().movedim(1, -1).reshape(-1, C).tolist()
    expected = torch.tensor([slow(score, x) for x in columns], dtype=torch.float64)
    found = every.double().movedim(1, -1).reshape(-1, C)
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    gap = (found[finite] - expected[finite]).abs().max()
    assert float(gap) <= score.tolerance(C)
    limits = score.range(C)
    assert limits is not None
    assert limits[0] <= float(found[finite].min()) <= float(found[finite].max()) <= limits[1]
    if score.follows_logits:
        order = logits.argsort(1)
        assert bool((every.gather(1, order).diff(dim=1) <= 0).all())


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_unusable_pixels_score_nan_and_any_number_of_axes_is_fine(score: Score) -> None:
    logits, labels = scene(1, (5,))
    logits[0, 1], logits[1] = torch.nan, -torch.inf
    assert bool(score(logits)[:2].isnan().all())
    assert bool(score.of_labels(logits, labels)[:2].isnan().all())
    assert bool(score.of_labels(logits, torch.full_like(labels, C)).isnan().all())
    assert score(logits[:0]).shape == (0, C)
    with pytest.raises(InputError, match=r"C = 4 classes|per class|4"):
        score(torch.zeros(2, C + 1))


@pytest.mark.parametrize("score", SCORES, ids=repr)
@pytest.mark.parametrize("store", ["exact", "histogram"])
def test_a_calibration_with_a_fitted_score_is_read_back_without_being_told_the_score(
    score: Score, store: str, tmp_path: Path
) -> None:
    logits, labels = scene(2, (30, 4, 5))
    calibrator = ClassConditionalCalibrator(C, score, store=store)  # type: ignore[arg-type]
    calibration = calibrator.update(logits, labels).compute(0.2)
    calibration.save(tmp_path / "c.json")
    back = Calibration.load(tmp_path / "c.json")
    assert back.score == score
    assert torch.equal(PixelSetPredictor(back)(logits), PixelSetPredictor(calibration)(logits))
    again = ClassConditionalCalibrator.from_state_dict(calibrator.state_dict())
    assert torch.equal(again.compute(0.2).thresholds, calibration.thresholds)


def test_ranks_are_the_conformal_quantiles_of_the_tuning_split() -> None:
    logits, labels = scene(3, (40, 3, 4))
    labels[:, 0, 0], labels[labels == 3] = 3, 0
    labels[:30][labels[:30] == 2] = 1
    logits += 2.5 * torch.nn.functional.one_hot(labels, C).movedim(-1, 1)
    tuning = ClassConditionalCalibrator(C, TopK(), store="exact").update(logits, labels)
    fitted = RC3P.fit(tuning, alpha=0.2, share=0.5)
    ranks = logits.argsort(1, descending=True).argsort(1).gather(1, labels[:, None])[:, 0] + 1
    for c in range(C):
        inside = [i for i in range(40) if bool((labels[i] == c).any())]
        n = len(inside)

        def beyond(k: int, c: int = c, inside: list[int] = inside) -> float:
            parts = [(ranks[i][labels[i] == c] > k).double().mean() for i in inside]
            return float(sum(parts))

        allowed = 0.1 * (n + 1) - 1
        good = [k for k in range(1, C + 1) if beyond(k) <= allowed + 1e-9]
        assert fitted.ranks[c] == (good[0] if n and allowed >= 0 else C)
    assert len(set(fitted.ranks)) > 1
    assert fitted.ranks != RC3P.fit(tuning, alpha=0.4, share=0.5).ranks
    assert fitted.fitted_on == tuning.fingerprint


def many(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 3 of 20 classes; each class is confused with one other, and has no other rival."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.rand(images, 20, generator=generator).argsort(1)[:, :3]
    labels = picks.repeat_interleave(5, 1)[:, :, None].expand(-1, -1, 2).reshape(images, 15, 2)
    truth = torch.nn.functional.one_hot(labels, 20).movedim(-1, 1).float()
    shift = torch.randn(images, 1, 15, 2, generator=generator)
    rival = truth.roll(1, 1)
    flat = 0.4 * torch.randn(images, 20, 15, 2, generator=generator)
    return 2.5 * truth + rival * (2 + 2 * shift) + flat, labels


def test_ranks_make_class_conditional_sets_smaller_and_keep_the_promise() -> None:
    sizes: dict[str, list[float]] = {"plain": [], "ranks": []}
    missed = []
    for draw in range(40):
        tuning = ClassConditionalCalibrator(20, TopK(), store="exact")
        tuning.update(*many(150, 3 * draw))
        fitted = RC3P.fit(tuning, alpha=0.1)
        data, (logits, labels) = many(150, 3 * draw + 1), many(12, 3 * draw + 2)
        scores: dict[str, Score] = {"plain": LAC(), "ranks": fitted}
        for name, score in scores.items():
            calibrator = ClassConditionalCalibrator(20, score, store="exact")
            sets = PixelSetPredictor(calibrator.update(*data).compute(0.1))(logits)
            sizes[name].append(float(sets.sum(1).double().mean()))
            if name == "ranks":
                # The mean over an image's classes, each of which is drawn equally often.
                held = sets.gather(1, labels[:, None])[:, 0]
                missed.append(float((~held).double().mean()))
    mean = torch.tensor(missed, dtype=torch.float64)
    assert float(mean.mean()) <= 0.1 + 3.72 * float(mean.std()) / 40**0.5
    assert sum(sizes["ranks"]) < 0.9 * sum(sizes["plain"])


def test_prevalence_covers_rare_classes_better_for_the_same_number_of_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.7, 0.27, 0.03])

    def data(images: int) -> tuple[Tensor, Tensor]:
        labels = torch.multinomial(share, images * 60, replacement=True, generator=generator)
        labels = labels.view(images, 60)
        truth = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
        noise = torch.randn(images, 3, 60, generator=generator)
        return 1.2 * truth + noise + share.log().view(1, -1, 1), labels

    fitted = PAS.fit(ClassConditionalCalibrator(3).update(*data(100)))
    assert fitted.prior == pytest.approx(share.tolist(), abs=0.02)
    held, size = {}, {}
    calibration_data, (logits, labels) = data(300), data(300)
    scores: dict[str, Score] = {"LAC": LAC(), "PAS": fitted}
    for name, score in scores.items():
        calibrator = SplitCalibrator(score).update(*calibration_data)
        sets = PixelSetPredictor(calibrator.compute(0.15))(logits)
        inside = sets.gather(1, labels[:, None])[:, 0]
        assert float(inside.double().mean()) >= 0.83
        held[name] = float(inside[labels == 2].double().mean())
        size[name] = float(sets.sum(1).double().mean())
    assert held["PAS"] > held["LAC"] + 0.2


def test_a_score_fitted_on_the_calibrators_own_data_is_refused() -> None:
    logits, labels = scene(4, (25, 4, 4))
    tuning = ClassConditionalCalibrator(C, TopK()).update(logits, labels)
    for fitted in (RC3P.fit(tuning, 0.2), PAS.fit(tuning)):
        same = ClassConditionalCalibrator(C, fitted).update(logits.flip(0), labels.flip(0))
        with pytest.raises(InputError, match="score must be fitted on a split of its own"):
            same.compute(0.2)
        ClassConditionalCalibrator(C, fitted).update(logits[1:], labels[1:]).compute(0.2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="tuning must be a ClassConditionalCalibrator of TopK"):
        RC3P.fit(ClassConditionalCalibrator(C, LAC()), 0.1)
    with pytest.raises(InputError, match="tuning must be a ClassConditionalCalibrator of TopK"):
        RC3P.fit(SplitCalibrator(TopK()), 0.1)
    with pytest.raises(InputError, match="tuning must count by class"):
        PAS.fit(SplitCalibrator())
    for wrong in ((0.5, 0.0), (0.5, float("nan")), (0.5, -1.0), ()):
        with pytest.raises(InputError, match="prior must hold a share"):
            PAS(wrong)
    with pytest.raises(InputError, match="ranks"):
        RC3P((0, 1))
    for temperature in (0.0, -1.0, inf, float("nan")):
        with pytest.raises(InputError, match="temperature must lie"):
            Recalibrated(temperature, (0.0,))
    with pytest.raises(InputError, match="bias must hold"):
        Recalibrated(1.0, (float("nan"),))


# --- recalibration -------------------------------------------------------------------------------


def overconfident(images: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Labels drawn from softmax(x / 2.5 + bias): that is what should be found."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(images // 8):
        x = 6 * torch.randn(8, 3, 10, 12, generator=generator)
        p = (x / 2.5 + torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)).softmax(1)
        drawn = torch.multinomial(p.movedim(1, -1).reshape(-1, 3), 1, generator=generator)
        labels = drawn.view(8, 10, 12)
        labels[:, 0, 0] = 255
        batches.append((x, labels))
    return batches


def test_the_fit_finds_the_temperature_and_the_biases_that_made_the_labels() -> None:
    made = recalibrate(SplitCalibrator, overconfident(160, 0), overconfident(40, 1))
    score = made.compute(0.1).score
    assert isinstance(score, Recalibrated)
    assert score.temperature == pytest.approx(2.5, rel=0.06)
    bias = torch.tensor(score.bias)
    assert (bias - bias.mean()).tolist() == pytest.approx([0.6, 0.0, -0.6], abs=0.06)


def test_the_fit_is_the_least_penalized_mean_over_images_of_the_log_loss() -> None:
    (logits, labels), *_ = overconfident(8, 2)
    labels[0, 1:] = 255  # images of unequal size count equally
    labels[1] = 255  # and one without labels not at all
    logits[2, 1, 3, 3] = -torch.inf
    labels[2, 3, 3] = 0
    score = recalibrate(SplitCalibrator, [(logits, labels)], overconfident(8, 3)).compute(0.3).score
    assert isinstance(score, Recalibrated)

    def loss(sharpness: float, bias: tuple[float, ...]) -> float:
        losses = []
        for x, y in zip(logits.double(), labels, strict=True):
            z = (x * sharpness + torch.tensor(bias).view(-1, 1, 1)).log_softmax(0)
            own = [-float(z[y[i, j], i, j]) for i in range(10) for j in range(12) if y[i, j] != 255]
            losses += [sum(own) / len(own)] if own else []
        pull = (sharpness - 1) ** 2 + sum(b * b for b in bias)
        return sum(losses) / len(losses) + 0.5e-3 * pull

    best = loss(1 / score.temperature, score.bias)
    for step in (1e-2, -1e-2):
        assert loss(1 / score.temperature + step, score.bias) > best
        for c in range(3):
            moved = tuple(b + step * (i == c) for i, b in enumerate(score.bias))
            assert loss(1 / score.temperature, moved) > best


def test_batches_do_not_matter_and_runs_agree_to_the_bit() -> None:
    fit_on, held = overconfident(32, 4), overconfident(16, 5)
    whole = [(torch.cat([x for x, _ in fit_on]), torch.cat([y for _, y in fit_on]))]
    first = recalibrate(SplitCalibrator, fit_on, held).score
    assert recalibrate(SplitCalibrator, fit_on, held).score == first
    assert recalibrate(SplitCalibrator, whole, held).score == first


def test_an_image_in_both_splits_is_refused() -> None:
    fit_on, held = overconfident(16, 6), overconfident(16, 7)
    spoiled = [*held, (fit_on[1][0][3:4], fit_on[1][1][3:4])]
    with pytest.raises(InputError, match="calibrate_on must have no image of fit_on; got 1"):
        recalibrate(SplitCalibrator, fit_on, spoiled)
    with pytest.raises(InputError, match="calibrate_on must have no image of fit_on; got 8"):
        recalibrate(SplitCalibrator, fit_on, fit_on)
    with pytest.raises(InputError, match="fit_on must be readable several times"):
        recalibrate(SplitCalibrator, iter(fit_on), held)
    for empty in ([], [(fit_on[0][0], torch.full_like(fit_on[0][1], 255))]):
        with pytest.raises(InputError, match="fit_on must hold a labeled pixel; got none"):
            recalibrate(SplitCalibrator, empty, held)
    wild = fit_on[0][0].clone()
    wild[0, 0, 5, 5] = torch.nan
    with pytest.raises(InputError, match=r"fit_on must be clean; got 0 .*, 1 with unusable"):
        recalibrate(SplitCalibrator, [(wild, fit_on[0][1])], held)
    labels = fit_on[0][1].clone()
    labels[0, 5, 5] = 7
    with pytest.raises(InputError, match="fit_on must be clean; got 1 pixels"):
        recalibrate(SplitCalibrator, [(fit_on[0][0], labels)], held)


def test_a_class_that_is_never_seen_and_separable_labels_leave_numbers_finite() -> None:
    logits = torch.eye(3)[:2].repeat(20, 1) * 9
    labels = torch.tensor([0, 1] * 20)
    made = recalibrate(SplitCalibrator, [(logits, labels)], [(logits + 1, labels)])
    score = made.score
    assert isinstance(score, Recalibrated)
    assert 0 < score.temperature < 1
    assert -10 < score.bias[2] < 0


def test_predictors_and_filters_take_the_models_own_logits() -> None:
    fit_on, held = overconfident(80, 8), overconfident(80, 9)
    made = recalibrate(partial(ClassConditionalCalibrator, 3), fit_on, held, LAC())
    calibration = made.compute(0.2)
    score = calibration.score
    assert isinstance(score, Recalibrated)
    logits = overconfident(8, 10)[0][0]
    p = (logits / score.temperature + torch.tensor(score.bias).view(1, 3, 1, 1)).softmax(1)
    expected = 1 - p <= calibration.thresholds.view(1, 3, 1, 1)
    assert torch.equal(PixelSetPredictor(calibration)(logits), expected)
    kept = Argmax(calibration)(logits)
    inside = torch.where(expected, logits, -torch.inf)
    assert torch.equal(kept == 255, ~expected.any(1))
    assert torch.equal(kept[kept != 255].long(), inside.argmax(1)[kept != 255])
