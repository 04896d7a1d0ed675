"""calibrate, filter and report on folders, run in this process."""

import html
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpseg import (
    Argmax,
    BackgroundPriority,
    Calibration,
    ClassConditionalCalibrator,
    Singleton,
    SplitCalibrator,
)
from cpseg.annotators import CachedAnnotator
from cpseg.cli import main
from cpseg.cli.inputs import Logits, unit_ids
from cpseg.errors import FileError, InputError
from cpseg.risk import KeptError, RiskCalibrator
from cpseg.training import PseudoLabelStore

IMAGES, CLASSES, SIZE = 11, 3, (5, 7)
NAMES = [f"im{index:02}" for index in range(IMAGES)]


@pytest.fixture(scope="module")
def pillow() -> Any:
    return pytest.importorskip("PIL.Image")


def logits_of(index: int) -> Tensor:
    """What image ``index`` has everywhere below. (C, H, W)"""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(CLASSES, *SIZE, generator=generator) * 2


def labels_of(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + index)
    labels = torch.randint(CLASSES, SIZE, generator=generator)
    if index % 3:  # class 2 only in every third image
        labels = labels.clamp(max=1)
    return torch.where(torch.rand(SIZE, generator=generator) < 0.1, 255, labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pillow: Any) -> Path:
    """logits/*.npy, probabilities/*.npz, masks/*.png, photos/*.png, classes.txt."""
    root = tmp_path_factory.mktemp("data")
    for name in ("logits", "probabilities", "masks", "photos"):
        (root / name).mkdir()
    for index, name in enumerate(NAMES):
        logits = logits_of(index)
        np.save(root / "logits" / f"{name}.npy", logits.numpy())
        np.savez(root / "probabilities" / f"{name}.npz", p=logits.double().softmax(0).numpy())
        pillow.fromarray(labels_of(index).byte().numpy()).save(root / "masks" / f"{name}.png")
        pillow.fromarray(image_of(index).movedim(0, 2).numpy()).save(
            root / "photos" / f"{name}.png"
        )
    (root / "classes.txt").write_text("road\nsky & <b>sea</b>\ncar\n")
    return root


def image_of(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(2000 + index)
    return torch.randint(256, (3, *SIZE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def cache(folder: Path) -> Path:
    """What annotate leaves behind, with nested names."""
    by_image = {image_of(index).numpy().tobytes(): index for index in range(IMAGES)}

    def annotator(images: Tensor) -> Tensor:
        return torch.stack([logits_of(by_image[image.numpy().tobytes()]) for image in images])

    made = CachedAnnotator(folder / "cache", annotator, source="test")
    listed = {f"{NAMES[index]}.jpg": made.ensure(image_of(index)) for index in range(IMAGES)}
    (folder / "cache" / "images.json").write_text(json.dumps(listed))
    return folder / "cache"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The last line on standard error, after which there is nothing."""

    def read() -> str:
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        lines: list[str] = captured.err.splitlines()
        assert sum(line.startswith("cpseg:") for line in lines) == 1
        return lines[-1]

    return read


def calibrate(folder: Path, out: Path, *words: str) -> int:
    inputs = ["--logits", f"{folder}/logits", "--values", "logits", "--labels", f"{folder}/masks"]
    return main(["calibrate", *inputs, "--alpha", "0.25", "-o", str(out), *words])


def by_hand(calibrator: Any, order: list[int]) -> Any:
    for index in order:
        calibrator.update(logits_of(index)[None], labels_of(index)[None])
    return calibrator.compute(0.25)


def test_calibrate_writes_what_a_loop_over_the_images_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, loop = tmp_path / "c.json", tmp_path / "loop.json"
    assert calibrate(folder, out, "--classes", f"{folder}/classes.txt") == 0
    source = "an unnamed source of logits"
    by_hand(ClassConditionalCalibrator(CLASSES, source=source), list(range(IMAGES))).save(loop)
    assert out.read_bytes() == loop.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "loop.json"]
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("road")]
    assert row.split()[1] == str(IMAGES)
    assert "75%" in row
    assert "For each class, in a new image that contains it" in " ".join(lines)


@pytest.mark.dist
@pytest.mark.parametrize("calibrator", ["class", "location"])
def test_processes_give_the_identical_file(folder: Path, tmp_path: Path, calibrator: str) -> None:
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    words = ["--calibrator", calibrator, "--score", "aps"]
    assert calibrate(folder, alone, *words) == 0
    assert calibrate(folder, shared, *words, "--jobs", "2") == 0
    assert alone.read_bytes() == shared.read_bytes()


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chosen=st.sets(st.integers(0, IMAGES - 1), min_size=1))
def test_a_list_of_names_chooses_them(folder: Path, tmp_path: Path, chosen: set[int]) -> None:
    listed, out = tmp_path / "names.txt", tmp_path / "c.json"
    listed.write_text("\n".join(NAMES[index] for index in sorted(chosen, reverse=True)) + "\n")
    assert calibrate(folder, out, "--calibrator", "split", "--names", str(listed)) == 0
    wanted = by_hand(SplitCalibrator(), sorted(chosen))
    found = Calibration.load(out)
    assert torch.equal(found.thresholds, wanted.thresholds)
    assert found.num_pixels.tolist() == wanted.num_pixels.tolist()


def test_probabilities_and_a_cache_agree_with_logits(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    assert calibrate(folder, tmp_path / "l.json") == 0
    shared = ["--labels", f"{folder}/masks", "--alpha", "0.25"]
    words = ["--logits", f"{folder}/probabilities", "--values", "probabilities"]
    assert main(["calibrate", *words, *shared, "-o", f"{tmp_path}/p.json"]) == 0
    assert main(["calibrate", "--logits", str(cache), *shared, "-o", f"{tmp_path}/k.json"]) == 0
    ours, theirs, cached = (Calibration.load(tmp_path / f"{name}.json") for name in "lpk")
    torch.testing.assert_close(theirs.thresholds, ours.thresholds, atol=2e-3, rtol=0)
    torch.testing.assert_close(cached.thresholds, ours.thresholds, atol=5e-3, rtol=0)
    assert cached.source == CachedAnnotator(cache).source
    assert ours.source == "an unnamed source of logits"
    assert theirs.source == "an unnamed source of probabilities"


def test_a_cache_is_read_without_its_images(cache: Path) -> None:
    reader = CachedAnnotator(cache)
    listed = json.loads((cache / "images.json").read_text())
    for index in range(IMAGES):
        logits = reader.read(listed[f"{NAMES[index]}.jpg"])
        assert torch.equal(logits, reader(image_of(index)[None])[0])
    with pytest.raises(FileError, match="must be a file of cached logits"):
        reader.read("nowhere.logits")


def test_volumes_calibrate_and_are_no_pictures(tmp_path: Path, told: Callable[[], str]) -> None:
    for name in ("logits", "labels"):
        (tmp_path / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(9):
        logits = torch.randn(2, 3, 4, 5, generator=generator).double()
        np.save(tmp_path / f"logits/{index}.npy", logits.numpy())
        np.savez(tmp_path / f"labels/{index}.npz", logits.argmax(0).numpy().astype("u1"))
    out = tmp_path / "c.json"
    assert calibrate(tmp_path, out, "--labels", f"{tmp_path}/labels", "--unit", "pixel") == 0
    assert Calibration.load(out).num_pixels.sum() == 9 * 60
    assert filtered(tmp_path, out, tmp_path / "kept") == 2
    assert "0: logits must be (C, H, W) to become a picture; got (2, 3, 4, 5)" in told()
    assert not (tmp_path / "kept").exists()


def test_units_of_several_images_count_once(folder: Path, tmp_path: Path) -> None:
    units = {name: f"patient {index // 2}" for index, name in enumerate(NAMES)}
    table = tmp_path / "units.csv"
    lines = [f"{name},{unit}" for name, unit in units.items()]
    table.write_text("\n".join(["name,unit", *lines, "unknown,patient 9"]) + "\n")
    assert calibrate(folder, tmp_path / "c.json", "--unit-ids", str(table)) == 0
    calibrator = ClassConditionalCalibrator(CLASSES)
    for index in range(IMAGES):
        calibrator.update(logits_of(index)[None], labels_of(index)[None], [index // 2])
    wanted, found = calibrator.compute(0.25), Calibration.load(tmp_path / "c.json")
    assert torch.equal(found.thresholds, wanted.thresholds)
    assert found.num_units.tolist() == wanted.num_units.tolist()
    assert found.num_units[0] == 6


def test_unit_ids_name_what_they_miss(tmp_path: Path) -> None:
    table = tmp_path / "units.csv"
    table.write_text("a,1\nb,2\n")
    assert unit_ids(table, ["b", "a"]) == {"b": 1, "a": 0}
    with pytest.raises(FileError, match="got none for c, d"):
        unit_ids(table, ["a", "c", "d"])
    table.write_text("a,1\na,2\n")
    with pytest.raises(FileError, match="two for a"):
        unit_ids(table, ["a"])
    table.write_text("a;1\n")
    with pytest.raises(FileError, match="two columns, name,unit; line 1"):
        unit_ids(table, ["a"])


def test_calibrate_as_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(folder, tmp_path / "c.json", "--alpha", "0.1", "0.2", "0.1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alpha"] == [0.1, 0.2, 0.1]
    assert found["thresholds"][2] == "inf"  # in 4 images, and alpha .1 needs 9
    assert found["num_units"] == [11, 11, 4]
    assert found["images"] == IMAGES


def test_names_without_a_partner_are_all_told_before_anything_is_read(
    folder: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    logits = tmp_path / "logits"
    logits.mkdir()
    for name in [*NAMES[2:], "extra", "more"]:
        (logits / f"{name}.npy").write_bytes(b"no array")
    words = ["--logits", str(logits), "--values", "logits", "--labels", f"{folder}/masks"]
    assert main(["calibrate", *words, "-o", f"{tmp_path}/c.json"]) == 2
    line = told()
    assert "2 with logits but no labels: extra, more" in line
    assert "2 with labels but no logits: im00, im01" in line
    assert "--names" in line
    for name in ("extra", "more"):
        (logits / f"{name}.npy").unlink()
    assert main(["calibrate", *words, "-o", f"{tmp_path}/c.json"]) == 2
    assert "got 2 with labels but no logits: im00, im01. List" in told()


def save(path: Path, array: Any) -> None:
    np.save(path, array)


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "logits/im03.npy").write_bytes(b"x"), "logits/im03.npy must be a"),
    (
        lambda root: save(root / "logits/im03.npy", np.zeros((3, 4, 4), "f4")),
        "masks/im03.png must be of the size of its logits, (4, 4); got (5, 7)",
    ),
    (
        lambda root: save(root / "logits/im03.npy", np.zeros((3, 5, 7), "i8")),
        "logits/im03.npy must hold floats of shape (C, *S); got int64 (3, 5, 7)",
    ),
    (
        lambda root: save(root / "logits/im03.npy", np.zeros((5, 7, 3), "f4")),
        "size of its logits, (7, 3); got (5, 7). Logits are (C, *S), classes first",
    ),
    (
        lambda root: (root / "logits/im03.npy").write_bytes(
            (root / "logits/im03.npy").read_bytes()[:200]
        ),
        "logits/im03.npy must be a sound .npy file; Failed to read all data",
    ),
    (
        lambda root: save(root / "logits/im03.npy", np.full((3, 5, 7), np.nan, "f4")),
        "logits/im03.npy must have a finite logit at every labeled pixel and no NaN",
    ),
    (
        lambda root: save(root / "logits/im03.npy", np.zeros((4, 5, 7), "f4")),
        "im03: logits must have C = 3 classes; got 4",
    ),
    (
        lambda root: (root / "masks/im03.png").write_bytes(b"x"),
        "masks/im03.png is damaged or no picture",
    ),
    (
        lambda root: (root / "masks/im03.png").write_bytes(gray(7)),
        "masks/im03.png must hold classes in [0, 3) or 255; got 7 at 35 pixels",
    ),
    (lambda root: (root / "classes.txt").write_text("a\nb\n"), "must name the 3 classes"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED)
def test_every_mistake_is_one_line_that_names_the_file(
    spoil: Callable[[Path], object],
    says: str,
    folder: Path,
    tmp_path: Path,
    told: Callable[[], str],
) -> None:
    for name in ("logits", "masks"):
        (tmp_path / name).mkdir()
        for path in (folder / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    spoil(tmp_path)
    out = tmp_path / "c.json"
    assert calibrate(tmp_path, out, "--classes", f"{tmp_path}/classes.txt") == 2
    assert says in told()
    assert not out.exists()


def gray(value: int) -> bytes:
    image = pytest.importorskip("PIL.Image").fromarray(np.full(SIZE, value, np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--alpha", "1.5"], "alpha must lie strictly between 0 and 1; got 1.5"),
        (["--alpha", "0.1", "0.2"], "alpha must be one number or one per class, 3; got 2"),
        (["--jobs", "0"], "--jobs must be an integer >= 1; got 0"),
        (["--ignore-index", "1"], "ignore_index must lie outside the classes"),
        (["--labels", "nowhere"], "--labels must be a folder; nowhere is none"),
        (["--unit", "pixel", "--unit-ids", "units.csv"], "units.csv"),
        (
            ["-o", "nowhere/c.json"],
            "--output must be a file in a folder that exists; got nowhere/c.json",
        ),
        (["-o", "."], "--output must be a file in a folder that exists; got ."),
        (["--values", "probabilities"], "probabilities must be finite and >= 0"),
    ],
)
def test_wrong_arguments_are_one_line(
    words: list[str], says: str, folder: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    assert calibrate(folder, tmp_path / "c.json", *words) == 2
    assert says in told()
    assert list(tmp_path.iterdir()) == []


def test_what_arrays_hold_is_declared_and_never_guessed(
    folder: Path, cache: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    words = ["--labels", f"{folder}/masks", "-o", f"{tmp_path}/c.json"]
    assert main(["calibrate", "--logits", f"{folder}/logits", *words]) == 2
    assert "--values must say what the files in" in told()
    assert main(["calibrate", "--logits", str(cache), "--values", "probabilities", *words]) == 2
    assert "--values, --key and --source must be left out" in told()


def test_an_npz_file_with_several_arrays_needs_a_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", p=np.zeros((2, 3), "f4"), q=np.ones((2, 3), ">f8"))
    files = {"a": tmp_path / "a.npz"}
    assert Logits(files, "", "logits", "q", None).read("a").tolist() == [[1.0] * 3] * 2
    with pytest.raises(FileError, match="--key must name one; it holds p, q"):
        Logits(files, "", "logits", None, None).read("a")
    with pytest.raises(FileError, match="must hold the array r"):
        Logits(files, "", "logits", "r", None).read("a")


@pytest.fixture(scope="module")
def calibration(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    assert calibrate(folder, path) == 0
    return path


def filtered(folder: Path, calibration: Path, out: Path, *words: str) -> int:
    inputs = ["--logits", f"{folder}/logits", "--values", "logits", "-o", str(out)]
    return main(["filter", str(calibration), *inputs, *words])


def test_filter_writes_what_the_filter_says_and_counts_it(
    folder: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept"
    names = ["--classes", f"{folder}/classes.txt"]
    capsys.readouterr()
    assert filtered(folder, calibration, out, "--json", *names) == 0
    found = json.loads(capsys.readouterr().out)
    store = PseudoLabelStore(out)
    assert store.names() == NAMES
    assert store.manifest["classes"] == ["road", "sky & <b>sea</b>", "car"]
    keep = Singleton(Calibration.load(calibration))
    kept = [0] * CLASSES
    for index, name in enumerate(NAMES):
        wanted = keep(logits_of(index)[None])[0]
        assert torch.equal(store.load(name), wanted)
        for label in wanted.flatten().tolist():
            if label != 255:
                kept[label] += 1
    assert found["pixels_kept"] == kept
    assert found["reasons"]["kept"] == sum(kept)
    assert sum(found["reasons"].values()) == found["pixels"] == IMAGES * 35
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.dist
def test_filtering_in_processes_gives_the_same_folder(
    folder: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    texts = []
    for out, jobs in (("one", "1"), ("two", "2")):
        assert filtered(folder, calibration, tmp_path / out, "--jobs", jobs) == 0
        texts.append(capsys.readouterr().out.replace(out, ""))
    assert texts[0] == texts[1]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("rule", ["argmax", "top", "background", "at-most"])
def test_every_rule_filters(folder: Path, calibration: Path, tmp_path: Path, rule: str) -> None:
    assert filtered(folder, calibration, tmp_path / "kept", "--rule", rule, "--guard") == 0
    assert PseudoLabelStore(tmp_path / "kept").names() == NAMES


def test_filter_refuses_a_folder_that_holds_something_and_other_sources(
    folder: Path, cache: Path, calibration: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert filtered(folder, calibration, tmp_path) == 2
    assert "--output must be a new or empty folder" in told()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    words = ["--logits", str(cache), "-o", f"{tmp_path}/kept"]
    assert main(["filter", str(calibration), *words]) == 2
    assert "must come from the logits it is used with" in told()
    assert filtered(folder, tmp_path / "none.json", tmp_path / "kept") == 2
    assert told() == (
        f"cpseg: {tmp_path}/none.json must be a calibration that cpseg calibrate wrote; "
        "No such file or directory"
    )


def test_logits_and_probabilities_are_not_taken_for_one_another(
    folder: Path, calibration: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    words = ["--logits", f"{folder}/probabilities", "--values", "probabilities"]
    out = ["-o", f"{tmp_path}/kept"]
    assert main(["filter", str(calibration), *words, *out]) == 2
    assert "made from an unnamed source of logits, these are from an unnamed source of prob" in (
        told()
    )
    assert list(tmp_path.iterdir()) == []
    assert filtered(folder, calibration, tmp_path / "kept", "--source", "seem") == 2
    assert "these are from seem" in told()
    made_in_python = tmp_path / "c.json"
    by_hand(ClassConditionalCalibrator(CLASSES), list(range(IMAGES))).save(made_in_python)
    assert filtered(folder, made_in_python, tmp_path / "kept") == 0
    assert filtered(folder, made_in_python, tmp_path / "more", "--source", "seem") == 2


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the sixth image is read."""
    read = Logits.read

    def stops(self: Logits, name: str) -> Tensor:
        if name == NAMES[5]:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Logits, "read", stops)


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize("command", ["calibrate", "filter", "report"])
def test_an_interrupt_leaves_nothing_behind(
    command: str, folder: Path, calibration: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    inputs = ["--logits", f"{folder}/logits", "--values", "logits", "-o", f"{tmp_path}/out"]
    labels = [] if command == "filter" else ["--labels", f"{folder}/masks"]
    given = [] if command == "calibrate" else [str(calibration)]
    assert main([command, *given, *inputs, *labels]) == 130
    assert told() == "cpseg: interrupted; nothing is left half-written"
    assert list(tmp_path.iterdir()) == []


def test_report_writes_one_file_and_json(
    folder: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    inputs = ["--logits", f"{folder}/logits", "--values", "logits", "--labels", f"{folder}/masks"]
    more = ["--images", f"{folder}/photos", "--classes", f"{folder}/classes.txt", "--worst", "1"]
    words = ["report", str(calibration), *inputs, *more, "-o", f"{tmp_path}/r.html"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == IMAGES
    assert found["same_data"] is True
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "sky &amp; &lt;b&gt;sea&lt;/b&gt;" in text
    assert "<b>sea</b>" not in text
    assert found["worst_images"][0] in text
    assert html.escape(shlex.join(["python", "-m", "cpseg", *words, "--json"])) in text
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def reported(folder: Path, calibration: Path, out: Path, *words: str) -> str:
    """The page, without the command that made it."""
    inputs = ["--logits", f"{folder}/logits", "--values", "logits", "--labels", f"{folder}/masks"]
    assert main(["report", str(calibration), *inputs, "-o", str(out), *words]) == 0
    return re.sub(r"<pre>.*?</pre>", "", out.read_text("utf-8"))


@pytest.mark.dist
def test_processes_give_the_identical_report(
    folder: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    alone = reported(folder, calibration, tmp_path / "alone.html")
    told = capsys.readouterr().out.partition(f"{tmp_path}")[0]
    assert reported(folder, calibration, tmp_path / "shared.html", "--jobs", "2") == alone
    assert capsys.readouterr().out.partition(f"{tmp_path}")[0] == told


@pytest.fixture(scope="module")
def compact(folder: Path) -> Path:
    """A cache that stores the best class only."""
    by_image = {image_of(index).numpy().tobytes(): index for index in range(IMAGES)}

    def annotator(images: Tensor) -> Tensor:
        return torch.stack([logits_of(by_image[image.numpy().tobytes()]) for image in images])

    root = folder / "compact"
    made = CachedAnnotator(root, annotator, source="test", best=1)
    listed = {f"{NAMES[index]}.jpg": made.ensure(image_of(index)) for index in range(IMAGES)}
    (root / "images.json").write_text(json.dumps(listed))
    return root


@pytest.mark.parametrize("rule", ["background", "singleton"])
def test_a_compact_cache_abstains_where_it_does_not_hold_enough_and_counts_it(
    folder: Path, compact: Path, tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    inputs = ["--logits", str(compact)]
    labels = ["--labels", f"{folder}/masks"]
    out, kept = tmp_path / "c.json", tmp_path / "kept"
    assert main(["calibrate", *inputs, *labels, "--alpha", "0.3", "-o", str(out)]) == 0
    capsys.readouterr()
    choice = ["--rule", rule]
    assert main(["filter", str(out), *inputs, *choice, "-o", str(kept), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keep = (BackgroundPriority if rule == "background" else Singleton)(Calibration.load(out))
    again = CachedAnnotator(compact).filter_again(
        torch.stack([image_of(index) for index in range(IMAGES)]), keep
    )
    assert 0 < found["unsettled"] == again.unsettled
    assert sum(found["reasons"].values()) + again.unsettled == found["pixels"] == IMAGES * 35
    assert found["reasons"]["kept"] == sum(found["pixels_kept"]) == int((again.labels != 255).sum())
    store = PseudoLabelStore(kept)
    for index, name in enumerate(NAMES):
        assert torch.equal(store.load(name), again.labels[index])

    # What the table says, and what the report measures, is what was written.
    assert main(["filter", str(out), *inputs, *choice, "-o", f"{tmp_path}/more"]) == 0
    share = f"{again.unsettled / (IMAGES * 35):.1%}"
    assert f"{share}  a class that the compact cache does not store" in capsys.readouterr().out
    page = f"{tmp_path}/r.html"
    assert main(["report", str(out), *inputs, *labels, *choice, "-o", page, "--json"]) == 0
    known = torch.stack([labels_of(index) for index in range(IMAGES)]) != 255
    wanted = ((again.labels != 255) & known).sum().item() / known.sum().item()
    assert json.loads(capsys.readouterr().out)["kept"] == pytest.approx(wanted)
    with pytest.raises(InputError, match="must be a filter"):
        CachedAnnotator(compact).filter_file("x", None)  # type: ignore[arg-type]


def test_a_certified_filter_is_applied_to_what_a_compact_cache_answers(compact: Path) -> None:
    cache = CachedAnnotator(compact)
    listed = json.loads((compact / "images.json").read_text())
    control = RiskCalibrator(KeptError(Argmax, CLASSES), source=cache.source)
    for index in range(IMAGES):
        logits = cache.read(listed[f"{NAMES[index]}.jpg"])
        control.update(logits[None], labels_of(index)[None])
    certified = Argmax(control.compute(0.5, 0.5))
    held = Logits({"a": compact / listed[f"{NAMES[0]}.jpg"]}, cache.source, "logits", None, cache)
    assert held.settled("a", certified) is None
    assert held.settled("a", Argmax(SplitCalibrator(source=cache.source).compute(0.5)))
