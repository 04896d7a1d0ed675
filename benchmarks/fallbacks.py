"""What fallbacks give classes that calibration hardly knows: coverage, and what it costs in size.

Twelve classes, odd ones hard; in calibration (60 images) all but the first four are in three
images each. The tuning split (80 images) and the new images (40) have them all. In the first
setting classes are equally frequent, in the second the first four are eight times as frequent and
easy. Means over draws, alpha .1:

    python benchmarks/fallbacks.py [draws]

The rows "weight ..." are ways of choosing the weight of an interpolated quantile: the smallest at
which the missed share, averaged over which classes, is at most alpha on the tuning split.
"""

import sys

import torch
from torch import Tensor

from cpseg import Calibration, ClassConditionalCalibrator, PixelSetPredictor
from cpseg.tuning import GroupClusters, InterpolatedQuantile, _toward

CLASSES, ALPHA = 12, 0.1


def draw(images: int, seed: int, frequent: int, *, scarce: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    often = torch.ones(CLASSES)
    often[:4] *= frequent
    if scarce:
        often[4:] = 0
    labels = torch.multinomial(often, images * 40, replacement=True, generator=generator)
    labels = labels.view(images, 40)
    if scarce:
        for k in range(4, CLASSES):
            labels[3 * k - 12 : 3 * k - 9, :10] = k
    hard = (labels % 2 == 1) & ((labels >= 4) | (frequent == 1))
    skill = torch.where(hard, 1.5, 4.0) + torch.randn(images, 1, generator=generator)
    hot = torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    return torch.randn(images, CLASSES, 40, generator=generator) + skill[:, None] * hot, labels


def weighed(tuning: ClassConditionalCalibrator, fitted: InterpolatedQuantile) -> dict[str, float]:
    own, pooled = tuning.evidence()
    base = pooled.quantiles([ALPHA])[0]
    exact = own.quantiles([ALPHA] * CLASSES)
    cap = torch.full_like(base, fitted.cap)
    weights = {"weight over hard classes (cpseg)": fitted.weight, "weight 1": 1.0}
    weight = 0.0
    for step in range(21):
        weight = step / 20
        missed = own.store.above(_toward(own, base, cap, weight)).double() / own.unit_mass
        risk = (missed + 1) / (own.num_units + 1)
        if float(risk[exact.isfinite()].mean()) <= ALPHA:
            break
    return {"weight over all known classes": weight, **weights}


def calibrations(frequent: int, seed: int) -> dict[str, Calibration]:
    tuning = ClassConditionalCalibrator(CLASSES).update(*draw(80, 3 * seed, frequent, scarce=False))
    calibrator = ClassConditionalCalibrator(CLASSES).update(
        *draw(60, 3 * seed + 1, frequent, scarce=True)
    )
    fitted = InterpolatedQuantile.fit(tuning, ALPHA)
    found = {
        "None": calibrator.compute(ALPHA),
        "pooled": calibrator.compute(ALPHA, fallback="pooled"),
        "clusters": calibrator.compute(ALPHA, fallback=GroupClusters.fit(tuning)),
    }
    for name, weight in weighed(tuning, fitted).items():
        other = InterpolatedQuantile(ALPHA, weight, fitted.cap, fitted.fitted_on)
        found[name] = calibrator.compute(ALPHA, fallback=other)
    return found


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    print("| frequencies | fallback | hard starved | easy starved | all | classes per set |")
    print("|---|---|---|---|---|---|")
    for frequent, told in ((1, "equal"), (8, "long tail")):
        total: dict[str, Tensor] = {}
        for seed in range(draws):
            logits, labels = draw(40, 3 * seed + 2, frequent, scarce=False)
            for name, calibration in calibrations(frequent, seed).items():
                sets = PixelSetPredictor(calibration)(logits)
                inside = sets.gather(1, labels[:, None])[:, 0].float()
                parts = [(labels >= 4) & (labels % 2 == odd) for odd in (1, 0)]
                row = [*(inside[part].mean() for part in parts), inside.mean()]
                row.append(sets.sum(1).float().mean())
                total[name] = total.get(name, torch.zeros(4)) + torch.stack(row) / draws
        for name, values in total.items():
            hard, easy, every, size = values.tolist()
            print(f"| {told} | {name} | {hard:.3f} | {easy:.3f} | {every:.3f} | {size:.2f} |")


if __name__ == "__main__":
    main()
