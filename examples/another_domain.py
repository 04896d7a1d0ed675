"""An annotator from another domain learns from a few labels what it gets wrong, and is calibrated.

    python examples/another_domain.py --output another_domain.png

It takes discs for squares, every time, and is sure of it: no threshold on its own probabilities
helps. A hundred labeled images teach two networks what to make of its answers, each calibrated on
what taught the other. The picture shows a new image, the classes that both leave, and the likeliest.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cpseg import plots
from cpseg.annotators import SyntheticAnnotator
from cpseg.data import SyntheticShapes
from cpseg.metrics import Coverage, SelectiveAccuracy
from cpseg.training import Example, Refined, UNet, class_weights_from, cross_fit, refine

CLASSES = SyntheticShapes.classes
DISC, SQUARE = CLASSES.index("disc"), CLASSES.index("square")
ANNOTATOR = SyntheticAnnotator(num_classes=len(CLASSES), error_rate=0.1, seed=0)

ALPHA = 0.1


def annotated(seed: int, images: int) -> list[Example]:
    """Image, the annotator's logits and labels; two seeds share no image."""
    found: list[Example] = []
    shapes = SyntheticShapes(length=images, size=(48, 64), objects=(4, 8), seed=seed)
    for index, (image, label) in enumerate(shapes):
        taken_for = torch.where(label == DISC, SQUARE, label)
        (logits,) = ANNOTATOR(taken_for[None], seeds=[seed << 32 | index])
        found.append((image, logits, label))
    return found


def main(words: list[str] | None = None) -> None:
    """Teach, calibrate, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("another_domain.png"))
    parser.add_argument("--steps", type=int, default=200, help="of teaching, for each half")
    given = parser.parse_args(words)

    def teach(known: Sequence[Example]) -> Refined:
        torch.manual_seed(0)
        network = UNet(len(CLASSES), channels=3 + len(CLASSES), width=16, depth=2, norm="batch")
        for last in network.head.parameters():
            nn.init.zeros_(last)  # to begin with what the annotator says
        weights = class_weights_from((labels for _, _, labels in known), len(CLASSES))
        return refine(network, known, class_weights=weights, steps=given.steps)

    both = cross_fit(teach, annotated(0, 50), annotated(1, 50), ALPHA)
    print(both.guarantee)

    coverage = Coverage(len(CLASSES))
    before, after = SelectiveAccuracy(len(CLASSES)), SelectiveAccuracy(len(CLASSES))
    new = annotated(2, 40)
    for image, logits, labels in new:
        shares = both(image[None], logits[None])
        coverage.update(shares > 0, labels[None])
        before.update(logits[None].argmax(1), labels[None])
        after.update(torch.where(shares.sum(1) > 0, shares.argmax(1), 255), labels[None])
    print(coverage.compute().table(CLASSES))
    told = [
        float(right.compute().accuracy_of_kept.mean_of_pixels.value) for right in (before, after)
    ]
    print(f"right: {told[0]:.1%} of the annotator's labels, {told[1]:.1%} of both together")

    image, logits, labels = next(example for example in new if bool((example[2] == DISC).any()))
    (shares,) = both(image[None], logits[None])
    figure = plots.one_image(
        shares.log().clamp(min=-20),
        shares > 0,
        image=image,
        pseudo_labels=torch.where(shares.sum(0) > 0, shares.argmax(0), 255),
        labels=labels,
        class_names=CLASSES,
    )
    plots.save(figure, given.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
