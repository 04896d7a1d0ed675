"""Every ``Guarantee:`` section says what, how probable, over what and if what; or says "none".

A section either promises something with a probability, and then the table below quotes its event,
its probability, what that is over, and what is assumed; or it states something that is always
true; or it points at another one; or it is none.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import cpseg
from cpseg import (
    Argmax,
    ClassConditionalCalibrator,
    GroupCalibrator,
    Guarantee,
    LocationCalibrator,
    SplitCalibrator,
)
from cpseg.bounds import betting, hoeffding_bentkus
from cpseg.margins import MarginCalibrator
from cpseg.risk import KeptError, Miscoverage, RiskCalibrator
from cpseg.shift import WeightedCalibrator

MISSED = "whose class is missing from their set is at most ``alpha``"

# Event, probability, over what, assumption.
PROMISES = {
    "bounds.hoeffding": (
        "the result is at most ``d``",
        "with probability at most ``d``",
        "over the losses",
        "If the losses are independent draws from one distribution on [0, 1]",
    ),
    "bounds.upper_bound": (
        "the mean is at most the result",
        "with probability at least ``1 - delta``",
        "over the losses",
        "If the losses are independent draws from one distribution on [0, 1]",
    ),
    "bounds.bonferroni": (
        "any true hypothesis is rejected",
        "the probability that any",
        "over the data",
        "If each p-value is valid",
    ),
    "quantile.conformal_quantile": (
        "the fresh one is at most the result",
        "With probability at least ``1 - alpha``",
        "over these scores and a fresh one",
        "if they are exchangeable",
    ),
    "calibrators.SplitCalibrator": (
        MISSED,
        "in expectation",
        "over the calibration images and the new one",
        "if they are exchangeable",
    ),
    "calibrators.ClassConditionalCalibrator": (
        "whose set misses it is at most that class's ``alpha``",
        "in expectation",
        "over the calibration images that contain it and the new one",
        "if images are exchangeable",
    ),
    "calibrators.GroupCalibrator": (
        MISSED,
        "in expectation",
        "over the calibration images that have such pixels and the new one",
        "if images are exchangeable and the groups are chosen without the labels",
    ),
    "calibrators.LocationCalibrator": (
        "the class of a new image is missing from its set",
        "with probability at most ``alpha``",
        "over the calibration images labeled there and the new one",
        "if images are exchangeable",
    ),
    "margins.Margins": (
        "holds a share ``tau`` of the true mask",
        "With probability at least ``1 - alpha``",
        "over the calibration images and the new one",
        "if they are exchangeable",
    ),
    "risk.RiskCalibrator": (
        "the risk expected over a new one is at most alpha",
        "with probability at least ``1 - delta``",
        "over the calibration images",
        "if all are independent draws from one distribution",
    ),
    "training.CrossFitted": (
        "whose probability is 0 is at most :attr:`alpha`",
        "in expectation",
        "over the labeled images and the new one",
        "if images are exchangeable",
    ),
    "shift.WeightedCalibration": (
        "whose class is missing from their set",
        "expected",
        "over the calibration images and the new one",
        "if calibration images are independent draws from P, the new one from Q",
    ),
    "shift.ExchangeabilityMartingale": (
        ":meth:`alarm` is ever raised",
        "with probability at most ``delta``",
        "over the stream and the smoothing draws",
        "If the numbers are exchangeable",
    ),
}
# True without a probability: what is stated, and of what.
ALWAYS = {
    "shift.AdaptiveLevel": ("the mean of the missed shares differs", "For any sequence"),
    "annotators.CachedAnnotator": ("keeps what it promises", "through one ``source``"),
    "annotators.CachedAnnotator.filter_again": ("a label is the one", "For scores that look"),
    "morphology.dilate": ("Keeps coverage", "it only grows"),
    "morphology.fill_holes": ("Keeps coverage", "it only grows"),
}
ANOTHER = r"(That of|See|What ``calibration`` guarantees)\b"


def section(thing: object) -> str | None:
    """The text of the section, on one line."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    if "Guarantee:" not in lines:
        return None
    text = []
    for line in lines[lines.index("Guarantee:") + 1 :]:
        if line and not line.startswith(" "):
            break
        text.append(line.strip())
    return " ".join(text).strip()


def public() -> Iterator[tuple[str, object]]:
    """Modules, what they export, and its methods; each once, by the first name it has."""
    seen: set[int] = set()
    names = sorted(
        (found.name for found in pkgutil.walk_packages(cpseg.__path__, "cpseg.")),
        key=lambda name: (name.count("."), name),
    )
    for name in names:
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        place = name.removeprefix("cpseg.")
        yield place, module
        for attribute in getattr(module, "__all__", ()):
            thing = getattr(module, attribute)
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            yield f"{place}.{attribute}", thing
            if inspect.isclass(thing):
                for method, function in vars(thing).items():
                    if not method.startswith("_"):
                        yield f"{place}.{attribute}.{method}", function


SECTIONS = {name: text for name, thing in public() if (text := section(thing)) is not None}


def test_there_are_sections_and_each_is_of_one_kind() -> None:
    assert len(SECTIONS) > 50
    listed = PROMISES.keys() | ALWAYS.keys()
    others = {
        name
        for name, text in SECTIONS.items()
        if not re.match(rf"None\b|{ANOTHER}", text) and name not in ALWAYS
    }
    assert others == PROMISES.keys()
    assert listed <= SECTIONS.keys()


@pytest.mark.parametrize("name", PROMISES)
def test_a_promise_names_event_probability_what_it_is_over_and_assumption(name: str) -> None:
    for part in PROMISES[name]:
        assert part in SECTIONS[name]


@pytest.mark.parametrize("name", ALWAYS)
def test_what_is_always_true_says_of_what(name: str) -> None:
    for part in ALWAYS[name]:
        assert part in SECTIONS[name]


@pytest.mark.parametrize(
    "name", [name for name, text in SECTIONS.items() if re.match(ANOTHER, text)]
)
def test_what_points_at_another_section_names_it(name: str) -> None:
    told = re.search(
        r":(?:func|attr|class):`|calibrator|predictor|of the sets|``calibration``", SECTIONS[name]
    )
    assert told is not None


# --- what objects say of themselves ---------------------------------------------------------------


def data(images: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (images, 6), generator=generator)
    logits = torch.randn(images, 2, 6, generator=generator)
    return logits + 3 * torch.nn.functional.one_hot(labels, 2).movedim(-1, 1), labels


@cache
def guarantees() -> dict[str, Guarantee]:
    logits, labels = data()
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    risk = RiskCalibrator(Miscoverage()).update(logits, labels)
    kept = RiskCalibrator(KeptError(Argmax, 2)).update(logits, labels)
    weighted = WeightedCalibrator().update(logits, labels, torch.ones(60)).compute(0.2)
    predicted, truth = logits.argmax(1) == 1, labels == 1
    return {
        "split": SplitCalibrator().update(logits, labels).compute(0.2).guarantee,
        "pixel": SplitCalibrator(unit="pixel").update(logits, labels).compute(0.2).guarantee,
        "class": ClassConditionalCalibrator(2).update(logits, labels).compute(0.2).guarantee,
        "group": GroupCalibrator(2).update(logits, labels, groups).compute(0.2).guarantee,
        "location": LocationCalibrator((6,)).update(logits, labels).compute(0.2).guarantee,
        "risk in expectation": risk.compute(0.2).guarantee,
        "risk": risk.compute(0.2, 0.1, bound=hoeffding_bentkus).guarantee,
        "risk by betting": risk.compute(0.2, 0.1, bound=betting).guarantee,
        "kept": kept.compute(0.2, 0.1).guarantee,
        "weighted": weighted.bounded(1.0).guarantee,
        "margins": MarginCalibrator().update(predicted, truth).compute(0.2).guarantee,
    }


@pytest.mark.parametrize("name", guarantees())
def test_every_statement_names_its_parts_and_how_many_images_it_rests_on(name: str) -> None:
    promise = guarantees()[name]
    assert re.search(
        r"\bat most 0\.2\b|holds a share|E\[wrong\] / E\[kept\]|missing", promise.event
    )
    assert "over the calibration" in promise.probability
    assert re.search(r"in expectation|probability|mean|average", str(promise))
    assert 0 < promise.n[0] <= promise.n[1]
    few, many = promise.n
    assert (f"{many} calibration" if few == many else f"{few} to {many} calib") in str(promise)
    assumed = "; ".join(promise.assumptions)
    # With probability 1 - delta over the calibration images, these must be independent.
    independent = name in ("risk", "risk by betting", "kept", "weighted")
    assert ("independent draws" if independent else "exchangeable") in assumed
    # A hash stands for the lot wherever the order decides.
    assert ("hash of seed and data" in assumed) == (name in ("risk by betting", "kept"))


def test_a_class_that_says_nothing_of_its_assumption_is_found() -> None:
    def silent() -> None:
        """Promise.

        Guarantee:
            The risk is at most alpha.
        """

    text = section(silent)
    assert text == "The risk is at most alpha."
    assert not re.match(rf"None\b|{ANOTHER}", text)
    assert section(data) is None
