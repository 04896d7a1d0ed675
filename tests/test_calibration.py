"""Calibration: files that round-trip exactly or are refused, and statements that are true."""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpseg import (
    APS,
    LAC,
    RAPS,
    SAPS,
    Calibration,
    ClassConditionalCalibrator,
    GroupCalibrator,
    LocationCalibrator,
    Margin,
    PixelSetPredictor,
    SplitCalibrator,
    TopK,
)
from cpseg.calibration import _digest, describe_score
from cpseg.errors import FileError, InputError
from cpseg.fitted import RC3P
from cpseg.protocols import Score
from cpseg.tuning import annuli

C, SPACE, G = 4, (5, 3), 2


@dataclass(frozen=True)
class Scaled:
    """A user's own score, with parameters of several kinds."""

    scale: float = 1.0
    shape: tuple[int, ...] = (1, 2)
    payload: object = None
    follows_logits: bool = True

    def __call__(self, logits: Tensor) -> Tensor:
        return -self.scale * logits

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -self.scale * logits.gather(1, labels[:, None])[:, 0]

    def range(self, num_classes: int) -> None:
        del num_classes

    def tolerance(self, num_classes: int) -> float:
        return 0.0 * num_classes


class Plain(Scaled):
    """Another one."""


def data(batch: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((batch, C, *SPACE), generator=generator)
    labels = torch.randint(0, C - 1, (batch, *SPACE), generator=generator)  # class 3 is absent
    return logits, labels


def made(kind: str, unit: Any = "image", alpha: Any = 0.1, fallback: Any = None) -> Calibration:
    logits, labels = data()
    groups = torch.arange(SPACE[0] * SPACE[1]).view(SPACE) % G
    match kind:
        case "split":
            return SplitCalibrator(unit=unit).update(logits, labels).compute(alpha, fallback)
        case "class":
            by_class = ClassConditionalCalibrator(C, unit=unit).update(logits, labels)
            return by_class.compute(alpha, fallback)
        case "group":
            by_group = GroupCalibrator(G, unit=unit).update(logits, labels, groups)
            return by_group.compute(alpha, fallback)
        case "both":
            by_both = GroupCalibrator(G, C, unit=unit).update(logits, labels, groups)
            return by_both.compute(alpha, fallback)
        case "location":
            by_place = LocationCalibrator(SPACE, unit=unit).update(logits, labels)
            return by_place.compute(alpha, fallback)
        case _:
            rings = LocationCalibrator(SPACE, annuli(SPACE, 2), unit=unit)
            return rings.update(logits, labels).compute(alpha, fallback)


KINDS = ["split", "class", "group", "both", "location", "rings"]


def assert_equal(one: Calibration, other: Calibration) -> None:
    for field in fields(Calibration):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert type(mine) is type(theirs), field.name
        if isinstance(mine, Tensor):
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name
    assert one.guarantee == other.guarantee


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("fallback", [None, "pooled"])
def test_a_file_gives_back_the_calibration_exactly(
    kind: str, unit: str, fallback: str | None, tmp_path: Path
) -> None:
    for alpha in (0.1, 0.01, [0.1, 0.3, 0.05, 0.2]):
        if isinstance(alpha, list) and kind not in ("class", "both"):
            continue
        calibration = made(kind, unit, alpha, fallback)
        path = tmp_path / "calibration.json"
        calibration.save(path)
        assert_equal(Calibration.load(path), calibration)
        assert_equal(Calibration.load(str(path)), calibration)
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "score",
    [
        LAC(),
        APS(randomized=True, seed=2**40),
        RAPS(penalty=0.1, k_reg=2),
        SAPS(weight=1 / 3),
        Margin(),
        TopK(),
    ],
    ids=repr,
)
def test_a_file_remembers_the_score_and_its_parameters(score: Score, tmp_path: Path) -> None:
    calibration = SplitCalibrator(score).update(*data()).compute(0.1)
    calibration.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    assert loaded.score == score
    logits = data(2)[0]
    assert torch.equal(PixelSetPredictor(loaded)(logits), PixelSetPredictor(calibration)(logits))
    assert_equal(Calibration.load(tmp_path / "c", score=score), calibration)


def test_every_bit_of_large_maps_survives(tmp_path: Path) -> None:
    shape = (200, 150)
    bits = torch.randint(0, 2**31 - 2**23, shape, generator=torch.Generator().manual_seed(1))
    thresholds = bits.int().view(torch.float32)
    thresholds[bits % 7 == 0] *= -1
    thresholds[0, 0] = math.inf
    large = bits << 31
    big = replace(
        made("location"),
        thresholds=thresholds,
        num_units=large,
        num_pixels=-large,
        fallback_groups=bits % 2 == 0,
        max_share=torch.rand(999, dtype=torch.float64),
        source="a cache",
        ignore_index=-100,
        num_classes=None,
    )
    big.save(tmp_path / "c")
    assert_equal(Calibration.load(tmp_path / "c"), big)
    assert (tmp_path / "c").stat().st_size < 100 * bits.numel()


def test_an_empty_calibrator_makes_a_file_too(tmp_path: Path) -> None:
    empty = SplitCalibrator().compute(0.1)
    empty.save(tmp_path / "c")
    assert_equal(Calibration.load(tmp_path / "c"), empty)


def test_a_score_of_ones_own_must_be_given_and_be_the_same(tmp_path: Path) -> None:
    calibrator = SplitCalibrator(Scaled(2.0), store="exact").update(*data())
    calibration = calibrator.compute(0.1)
    calibration.save(tmp_path / "c")
    assert_equal(Calibration.load(tmp_path / "c", score=Scaled(2.0)), calibration)
    name = f"{Scaled.__module__}.Scaled"
    told = f"{name}(scale=2.0, shape=[1, 2], payload=None, follows_logits=True)"
    with pytest.raises(InputError) as missing:
        Calibration.load(tmp_path / "c")
    assert str(missing.value) == f"score must be given: this was made with {told}"
    for wrong in (Scaled(3.0), Scaled(2.0, shape=(1, 3)), Plain(2.0), LAC()):
        with pytest.raises(InputError, match=r"^score must be .*\(scale=2\.0, .*; got "):
            Calibration.load(tmp_path / "c", score=wrong)


@pytest.mark.parametrize(
    "payload", [torch.zeros(2), math.nan, object()], ids=["tensor", "nan", "object"]
)
def test_a_score_whose_parameters_no_file_can_hold_is_refused(
    payload: object, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="score must have parameters that JSON can hold"):
        describe_score(Scaled(payload=payload))
    calibration = replace(made("split"), score=Scaled(payload=payload))
    with pytest.raises(InputError, match="JSON"):
        calibration.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_built_in_score_refuses_another(tmp_path: Path) -> None:
    made("split").save(tmp_path / "c")
    with pytest.raises(InputError) as refusal:
        Calibration.load(tmp_path / "c", score=APS())
    assert str(refusal.value) == (
        "score must be LAC(), which made this; got APS(randomized=False, seed=0)"
    )


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(FileError) as refusal:
        Calibration.load(path)
    message = str(refusal.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    made("class").save(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    for end in range(0, len(whole.rstrip()), 3):
        refused(tmp_path / "c", whole[:end])


def test_a_digit_changed_anywhere_is_refused(tmp_path: Path) -> None:
    share = torch.tensor([1e-05, 2e-20, 0.5, 0.0], dtype=torch.float64)
    replace(made("class"), max_share=share).save(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    for at, byte in enumerate(whole):
        if chr(byte) in "0123456789-.":  # also 1e-05 to 1e905, an overflow
            for other in b"0179":
                if other != byte:
                    changed = whole[:at] + bytes([other]) + whole[at + 1 :]
                    if float_equal(whole, changed):
                        continue
                    refused(tmp_path / "c", changed)


def float_equal(one: bytes, other: bytes) -> bool:
    """Whether two texts hold the same numbers, as 1e-05 and 1e-05 written otherwise do."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe" * 99,
        b"PK\x03\x04" + bytes(range(256)),
        b"\x80\x04\x95",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b"[]",
        b"null",
        b'"cpseg.calibration"',
        b"{}",
        b'{"format": "coco", "version": 1}',
        b'{"format": "cpseg.calibration"}',
        b'{"format": "cpseg.calibration", "version": 1}',
        b'{"format": "cpseg.calibration", "version": 1, "sha256": null}',
        b'{"format": "cpseg.calibration", "version": 1, "alpha": NaN, "sha256": "0"}',
        b'{"format": "cpseg.calibration", "version": 1, "alpha": 1e999, "sha256": "0"}',
    ],
)
def test_foreign_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    message = refused(tmp_path / "c", content)
    assert "not a cpseg calibration" in message or "version" in message or "damaged" in message
    assert len(message) < len(str(tmp_path)) + 200


def test_another_version_is_named(tmp_path: Path) -> None:
    made("split").save(tmp_path / "c")
    content = json.loads((tmp_path / "c").read_bytes())
    for version in (2, 0, None, "1"):
        message = refused(tmp_path / "c", json.dumps({**content, "version": version}).encode())
        assert message.endswith(f"has version {version}; this cpseg reads version 1")


@pytest.mark.parametrize("field", [f.name for f in fields(Calibration)])
def test_a_field_left_out_is_refused(field: str, tmp_path: Path) -> None:
    made("class").save(tmp_path / "c")
    content = json.loads((tmp_path / "c").read_bytes())
    del content[field]
    assert "damaged" in refused(tmp_path / "c", json.dumps(content).encode())


def test_a_missing_file_or_a_directory_is_what_the_system_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Calibration.load(tmp_path / "nowhere")
    with pytest.raises(OSError, match=tmp_path.name):
        Calibration.load(tmp_path)
    missing = tmp_path / "nowhere" / "c"
    with pytest.raises(FileNotFoundError) as refusal:
        made("split").save(missing)
    assert refusal.value.filename == str(missing)
    assert str(missing) in str(refusal.value)
    assert "partial" not in str(refusal.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as taken:  # the name is a folder's
        made("split").save(tmp_path / "folder")
    assert taken.value.filename == str(tmp_path / "folder")
    assert "partial" not in str(taken.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def text_of(**wrong: Any) -> str:
    with pytest.raises(InputError) as refusal:
        replace(made("class"), **wrong)
    message = str(refusal.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"thresholds": [0.5] * C}, "thresholds must be a torch tensor; got list"),
        (
            {"thresholds": torch.zeros(C, dtype=torch.float64)},
            "thresholds must be torch.float32; got torch.float64",
        ),
        ({"num_units": torch.zeros(C)}, "num_units must be torch.int64; got torch.float32"),
        (
            {"fallback_groups": torch.zeros(C).long()},
            "fallback_groups must be torch.bool; got torch.int64",
        ),
        (
            {"axes": ("classes",)},
            (
                'axes must be (), ("class",), ("group",), ("group", "class") or ("location",); got '
                "('classes',)"
            ),
        ),
        ({"axes": ()}, "thresholds must have the axes (), none empty; got shape (4,)"),
        (
            {"axes": ("group", "class")},
            "thresholds must have the axes ('group', 'class'), none empty; got shape (4,)",
        ),
        (
            {"thresholds": torch.zeros(0), "num_classes": None},
            "thresholds must have the axes ('class',), none empty; got shape (0,)",
        ),
        (
            {"num_pixels": torch.zeros(3).long()},
            "num_pixels must have shape (4,) to go with thresholds; got (3,)",
        ),
        ({"num_classes": 5}, "thresholds must have one per class, 5; got (4,)"),
        ({"num_classes": 4.5}, "num_classes must be an integer >= 1; got 4.5"),
        (
            {"max_share": torch.zeros(2, dtype=torch.float64)},
            "max_share must have shape (4,) to go with num_classes; got (2,)",
        ),
        ({"unit": "patch"}, 'unit must be "image" or "pixel"; got \'patch\''),
        ({"ignore_index": 2}, "ignore_index must lie outside the classes [0, 4); got 2"),
        ({"alpha": 1.5}, "alpha must lie strictly between 0 and 1; got 1.5"),
        (
            {"alpha": (0.1, 0.2)},
            (
                "alpha must be one number, or one per class of axes ('class',) and thresholds (4,); "
                "got 2"
            ),
        ),
        ({"alpha": (0.1, 0.2, 0.3, 2.0)}, "alpha must lie strictly between 0 and 1; got 2.0"),
        ({"score": LAC}, "score must be an object; got the class LAC. Make one: LAC()"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(wrong: dict[str, Any], told: str) -> None:
    assert text_of(**wrong) == told


def test_alpha_per_class_needs_a_class_axis() -> None:
    with pytest.raises(InputError, match="alpha must be one number, or one per class"):
        replace(made("split"), alpha=(0.1,))


def test_a_whole_file_of_parts_that_do_not_fit_is_refused_as_a_file(tmp_path: Path) -> None:
    made("class").save(tmp_path / "c")
    content = json.loads((tmp_path / "c").read_bytes())
    del content["sha256"]
    wrong: list[dict[str, Any]] = [
        {"axes": ["group", "class"]},
        {"num_units": {"shape": [2], "values": [1, 2]}},
        {"alpha": 3.0},
        {"score": "LAC"},
        {"score": {"name": "LAC"}},
        {"score": {"name": "LAC", "parameters": {"size": 3}}},
    ]
    for entry in wrong:
        fields = {**content, **entry}
        message = refused(
            tmp_path / "c", json.dumps({**fields, "sha256": _digest(fields)}).encode()
        )
        assert "is not a complete calibration" in message


def test_numbers_of_numpy_are_described_as_pythons() -> None:
    made_by_numpy = Scaled(np.float32(0.5), (np.int64(1), 2))  # type: ignore[arg-type]
    assert describe_score(made_by_numpy) == describe_score(Scaled(0.5, (1, 2)))


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_failing_write_leaves_the_old_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = made("split")
    old.save(tmp_path / "c")

    def fail(path: Path, *given: Any, **named: Any) -> None:
        del named
        if method == "write_text":
            path.write_bytes(str(given[0])[:100].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(OSError, match="no space"):
        made("class").save(tmp_path / "c")
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert_equal(Calibration.load(tmp_path / "c"), old)


def test_saving_over_an_old_file_replaces_it_whole(tmp_path: Path) -> None:
    made("location").save(tmp_path / "c")
    made("split").save(tmp_path / "c")
    assert_equal(Calibration.load(tmp_path / "c"), made("split"))


def test_the_file_is_text_that_a_person_can_read(tmp_path: Path) -> None:
    calibration = made("class")
    calibration.save(tmp_path / "c")
    text = (tmp_path / "c").read_text("utf-8")
    content = json.loads(text)
    assert content["guarantee"] == str(calibration.guarantee)
    assert content["score"] == {"name": "LAC", "parameters": {}}
    assert len(text.splitlines()) == len(content) + 2


# --- what it says --------------------------------------------------------------------------------

SHARE = "is at most 0.1, in expectation over the calibration images and the new one"
EVENTS = {
    ("split", "image"): "In a new image, the share of labeled pixels whose class is missing from "
    f"their set {SHARE} (12 calibration images). ",
    ("class", "image"): "For each class, in a new image that contains it, the share of its "
    f"labeled pixels whose set misses it {SHARE} (0 to 12 calibration images). ",
    ("group", "image"): "For each group, in a new image with labeled pixels there, the share of "
    f"them whose class is missing from their set {SHARE} (12 calibration images). ",
    ("both", "image"): "For each group and class, in a new image with labeled pixels of that "
    f"class in that group, the share of them whose set misses it {SHARE} (0 to 12 ",
    ("location", "image"): "For each location, in a new image labeled there, the class is "
    "missing from its set with probability at most 0.1, over the calibration images and the new "
    "one (12 calibration images). ",
    ("rings", "image"): "For each cluster of locations, in a new image with labeled pixels there, "
    f"the share of them whose class is missing from their set {SHARE} (12 calibration images). ",
    ("split", "pixel"): "A new labeled pixel has a set that misses its class with probability at "
    "most 0.1, over the calibration pixels and the new one (180 calibration pixels). ",
    ("class", "pixel"): "For each class, a new labeled pixel of that class has a set that misses "
    "it with probability at most 0.1, over the calibration pixels and the new one (0 to ",
    ("group", "pixel"): "For each group, a new labeled pixel there has a set that misses its "
    "class with probability at most 0.1, over the calibration pixels and the new one (84 to 96 ",
    ("both", "pixel"): "For each group and class, a new labeled pixel of that class in that group "
    "has a set that misses it with probability at most 0.1, over the calibration pixels ",
    ("rings", "pixel"): "For each cluster of locations, a new labeled pixel there has a set that "
    "misses its class with probability at most 0.1, over the calibration pixels ",
}


@pytest.mark.parametrize(("kind", "unit"), EVENTS, ids=lambda part: part)
def test_the_sentence_says_event_level_unit_n_and_probability(kind: str, unit: str) -> None:
    guarantee = made(kind, unit).guarantee
    text = str(guarantee)
    assert text.startswith(EVENTS[kind, unit])
    assert guarantee.unit == unit
    assert guarantee.level == 0.9
    assert f"the calibration {unit}s and the new one are exchangeable" in text
    assert "chosen without the calibration labels" in text
    assert ("and groups" in text) == (kind in ("group", "both"))
    assert ("and clusters" in text) == (kind == "rings")
    assert text.endswith(".")
    assert not any(flaw in text for flaw in ("..", "  ", " .", " ,", "{", "None"))


def test_pixels_at_single_locations_are_images() -> None:
    # An image has one pixel there, so the exchangeability of images is all it takes.
    assert made("location", "pixel").guarantee == made("location", "image").guarantee


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_pixels_say_what_they_do_not_promise(kind: str) -> None:
    told = "Pixels of one image are not exchangeable with those of another"
    bound = "alpha + (1 - alpha) / (m + 1) if all images"
    by_pixel, by_image = (str(made(kind, unit).guarantee) for unit in ("pixel", "image"))
    assert told not in by_image
    assert (told in by_pixel) == (kind != "location")
    assert (bound in by_pixel) == (kind in ("split", "group", "rings"))
    assert ("so for pixels that come in images nothing is promised." in by_pixel) == (
        kind in ("class", "both")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_an_image_do_not_speak_for_the_whole(kind: str) -> None:
    text = str(made(kind).guarantee)
    implies = "It implies the same for an image as a whole where every image is labeled every"
    assert ("It does not imply the same for an image as a whole." in text) == (
        kind in ("class", "group", "both")
    )
    assert (implies in text) == (kind in ("location", "rings"))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("split", ("No finite threshold can promise this with so few calibration images: every set "
         "is full.")),
        ("class", "for classes 0, 1, 2, 3 with so few calibration images: kept in every set."),
        ("group", "for groups 0, 1 with so few calibration images: every set there is full."),
        ("both", ("for (group, class) (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)"
         " with so few calibration images: kept in every set.")),
        ("location", ("for locations (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1),"
         " (2, 2), (3, 0), (3, 1), (3, 2) and 3 more with so few calibration images: every set "
         "there is full.")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fallback", [None, "pooled"])
def test_groups_without_a_finite_threshold_are_named(
    kind: str, told: str, fallback: str | None
) -> None:
    # Where the fallback has no finite threshold either, the full sets keep the promise.
    text = str(made(kind, alpha=0.01, fallback=fallback).guarantee)
    assert told in text
    assert f" 99 images{'' if kind == 'split' else ' each'} would do." in text
    assert "Nothing is promised" not in text
    assert "end of the score's range" not in text


def test_as_many_images_as_would_do_are_told_per_level_and_not_where_there_are_enough() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0]]).repeat(30, 1)
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 3)
    calibrator = ClassConditionalCalibrator(3).update(logits, labels)
    assert "19 images each would do." in str(calibrator.compute(0.05).guarantee)
    mixed = calibrator.compute([0.05, 0.1, 0.2]).guarantee
    assert "for classes 1, 2 with" in str(mixed)
    assert "4 to 9 images each would do." in str(mixed)
    assert "would do" not in str(calibrator.compute(0.3).guarantee)
    # Enough images, and yet nothing is finite: more of them would not help.
    beyond = SplitCalibrator(RC3P((1, 1, 1))).update(logits[:, [1, 0, 2]], labels).compute(0.1)
    assert beyond.thresholds.tolist() == [torch.inf]
    told = str(beyond.guarantee)
    assert "can promise this as too many scores are infinite: every set is full." in told
    assert "would do" not in told


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("split", "The threshold lies at the end of the score's range: every set is full."),
        ("class", ("For class 1 the threshold lies at the end of the score's range: kept in every "
         "set.")),
        ("group", ("For group 1 the threshold lies at the end of the score's range: every set there "
         "is full.")),
    ],
)  # fmt: skip
def test_a_finite_threshold_that_nothing_exceeds_is_named(kind: str, told: str) -> None:
    calibration = made(kind)
    thresholds = torch.full_like(calibration.thresholds, 0.5)
    thresholds[0 if kind == "split" else 1] = 1.0
    at_the_end = replace(calibration, thresholds=thresholds)
    assert told in at_the_end.guarantee.exceptions
    before = replace(at_the_end, thresholds=thresholds.nextafter(torch.zeros(())))
    assert "end of the score's range" not in str(before.guarantee)
    logits = torch.zeros(1, C, 2).index_fill(1, torch.tensor(0), 200.0)  # the others score 1
    groups = torch.tensor([0, 1]) if kind == "group" else None
    full = PixelSetPredictor(at_the_end)(logits, groups)
    assert full.sum().item() == {"split": 8, "class": 4, "group": 5}[kind]
    assert PixelSetPredictor(before)(logits, groups).sum().item() == 2


def test_an_overconfident_model_of_many_classes_is_told_that_its_sets_are_full() -> None:
    # One image in two has its class at probability 0: within the tolerance of 1.
    logits = torch.zeros(30, 150, 4)
    logits[:, 0] = 40.0
    labels = torch.zeros(30, 4, dtype=torch.int64)
    labels[::2] = 7
    calibration = SplitCalibrator().update(logits, labels).compute(0.1)
    assert calibration.thresholds.isfinite().all()
    assert PixelSetPredictor(calibration)(logits).all()
    assert "every set is full." in str(calibration.guarantee)
    ranked = SplitCalibrator(TopK()).update(logits, labels).compute(0.1)
    assert "every set is full." not in str(ranked.guarantee)


def test_groups_with_a_fallback_are_named_and_promised_nothing() -> None:
    calibration = made("class", fallback="pooled")
    assert calibration.guarantee.n == (12, 12)  # what the promise rests on, class 3 left out
    assert (
        "Nothing is promised for class 3: with so few calibration images the threshold comes from "
        'the fallback "pooled".' in calibration.guarantee.exceptions
    )
    assert "No finite threshold" not in str(calibration.guarantee)


def test_a_location_with_a_fallback_ends_what_is_said_of_the_whole() -> None:
    replaced = torch.zeros(SPACE, dtype=torch.bool)
    replaced[2, 1] = True
    text = str(replace(made("location"), fallback="pooled", fallback_groups=replaced).guarantee)
    assert "Nothing is promised for location (2, 1): " in text
    assert text.endswith("It does not imply the same for an image as a whole.")


def test_levels_are_decimals_and_one_per_class_where_alpha_is() -> None:
    assert made("split", alpha=0.9).guarantee.level == 0.1
    guarantee = made("class", alpha=[0.1, 0.3, 0.05, 0.2]).guarantee
    assert guarantee.level == (0.9, 0.7, 0.95, 0.8)
    assert "misses it is at most alpha of that class (0.05 to 0.3), in exp" in str(guarantee)
    assert "(0.1), in exp" in str(made("class", alpha=[0.1] * 4).guarantee)
    assert "is at most 0.123456789, in" in str(made("split", alpha=0.123456789).guarantee)


def test_one_image_is_singular_and_a_source_is_named() -> None:
    one = SplitCalibrator(source="the cache").update(*data(1)).compute(0.1)
    assert "(1 calibration image)." in str(one.guarantee)
    assert "computed as those for calibration were, by the cache." in str(one.guarantee)


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibration_prints_in_one_short_line(kind: str) -> None:
    text = repr(made(kind))
    assert text.startswith("Calibration(axes=")
    assert "\n" not in text
    assert len(text) < 220
    assert "tensor" not in text


def test_the_line_says_what_came_out() -> None:
    assert repr(SplitCalibrator().compute(0.1)) == (
        "Calibration(axes=(), alpha=0.1, score=LAC(), num_classes=None: "
        "0 of 1 thresholds finite, 0 images, fallback=None)"
    )
    text = repr(made("class", alpha=[0.1, 0.3, 0.1, 0.2]))
    assert "alpha=0.1 to 0.3, score=LAC(), num_classes=4: 3 of 4 thresholds finite in [0." in text
    assert "], 0 to 12 images, fallback=None)" in text
