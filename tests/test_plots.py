"""Figures hold the numbers they were given, touch nothing global, and can be told apart."""

import json
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpseg import plots
from cpseg.errors import FileError, InputError, MissingExtraError
from cpseg.metrics import Coverage, CoverageReport
from cpseg.plots import Certified, ConfidenceCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib")

C, H, W = 4, 6, 9


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, sets and labels of one image; a corner is void."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(C, H, W, generator=generator)
    sets = torch.rand(C, H, W, generator=generator) < 0.5
    labels = torch.randint(C, (H, W), generator=generator)
    labels[:2, :3] = 255
    return logits, sets, labels


def titled(figure: "Figure", start: str) -> Any:
    (axes,) = [axes for axes in figure.axes if axes.get_title().startswith(start)]
    return axes


def drawn_in(figure: "Figure") -> list[Any]:
    return list(figure.axes)


def shown(axes: "Axes", index: int = 0) -> Any:
    return np.asarray(axes.images[index].get_array())


def color(text: str) -> list[float]:
    return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def lines(axes: "Axes") -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines}


# --- one image ---


def test_the_panels_of_an_image_show_what_was_given() -> None:
    logits, sets, labels = example()
    image = torch.arange(3 * H * W, dtype=torch.uint8).view(3, H, W)
    pseudo = torch.where(sets.sum(0) == 1, logits.argmax(0), 255)
    figure = plots.one_image(
        logits, sets, image=image, pseudo_labels=pseudo, labels=labels, chosen=2, title="x"
    )
    assert (shown(titled(figure, "image")) == image.permute(1, 2, 0).numpy()).all()
    sizes = shown(titled(figure, "classes still possible (of 4)"))
    assert sizes.tolist() == sets.sum(0).tolist()
    of_class = shown(titled(figure, "is it 2?"))
    for y in range(H):
        for x in range(W):
            alone = int(sets[:, y, x].sum()) == 1
            assert of_class[y, x] == (0 if not sets[2, y, x] else 2 if alone else 1)
    top = shown(titled(figure, "most likely class"))
    for y in range(H):
        for x in range(W):
            wanted = color(plots.class_color(int(logits[:, y, x].argmax())))
            assert top[y, x] == pytest.approx(wanted)
    assert str(figure.get_suptitle()) == "x"


def test_abstention_is_hatched_exactly_where_the_filter_abstains() -> None:
    logits, sets, _ = example()
    pseudo = torch.where(sets.sum(0) == 1, logits.argmax(0), 255)
    axes = titled(plots.one_image(logits, sets, pseudo_labels=pseudo), "pseudo-labels")
    stripes = shown(axes, 1)
    factor = stripes.shape[0] // H
    assert stripes.shape == (factor * H, factor * W, 4)
    for y in range(H):
        for x in range(W):
            cell = stripes[factor * y : factor * (y + 1), factor * x : factor * (x + 1)]
            abstains = int(pseudo[y, x]) == 255
            assert (cell[..., 3] == abstains).all()
            if abstains:  # light and dark within every pixel
                assert cell[..., 0].min() < 0.3
                assert cell[..., 0].max() > 0.9
    share = 1 - (pseudo == 255).double().mean().item()
    assert axes.get_title() == f"pseudo-labels, {share:.0%} kept"


def test_errors_tell_a_lost_truth_from_a_wrong_guess_and_void_is_void() -> None:
    logits, sets, labels = example()
    axes = titled(plots.one_image(logits, sets, labels=labels), "errors")
    drawn = shown(axes)
    for y in range(H):
        for x in range(W):
            label = int(labels[y, x])
            if label == 255:
                wanted = color(plots.VOID)
            elif not sets[label, y, x]:
                wanted = color("#a50026")
            elif int(logits[:, y, x].argmax()) != label:
                wanted = color("#e69f00")
            else:
                wanted = [0.92] * 3
            assert drawn[y, x] == pytest.approx(wanted)
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["wrong, truth in the set", "truth lost", "void"]


def test_the_class_in_doubt_most_often_is_chosen_and_named() -> None:
    logits, sets, _ = example()
    sets[:] = False
    sets[1], sets[3, 0] = True, True  # class 1 is sure but in one row
    sets[0, 0, 0] = True
    figure = plots.one_image(logits, sets, class_names=["a", "b", "c", "d"])
    assert titled(figure, "is it b?")
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert words == ["a", "b", "c", "d"]


def test_an_image_that_does_not_fit_is_refused() -> None:
    logits, sets, labels = example()
    with pytest.raises(InputError, match=r"logits must be \(C, H, W\); got \(1, 4, 6, 9\)"):
        plots.one_image(logits[None], sets)
    with pytest.raises(InputError, match="sets must be bool and of the shape of logits"):
        plots.one_image(logits, sets[:3])
    with pytest.raises(InputError, match=r"labels must have shape \(6, 9\)"):
        plots.one_image(logits, sets, labels=labels[:3])
    with pytest.raises(InputError, match=r"image must have shape \(3, 6, 9\)"):
        plots.one_image(logits, sets, image=torch.zeros(3, 9, 6, dtype=torch.uint8))
    with pytest.raises(InputError, match="class_names must hold 4 names; got 2"):
        plots.one_image(logits, sets, class_names=["a", "b"])


# --- calibration ---


def measured(classes: int = 3, images: int = 12) -> CoverageReport:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (images, 50), generator=generator)
    sets = torch.rand(images, classes, 50, generator=generator) < 0.8
    return Coverage(classes).update(sets, labels).compute(resamples=50)


def test_coverage_by_class_draws_the_report_with_the_least_covered_first() -> None:
    report = measured()
    figure = plots.coverage_by_class(report, 0.1, class_names=["a", "b", "c"])
    (axes,) = drawn_in(figure)
    means = report.classes.mean_of_images
    order = sorted(range(3), key=lambda c: means.value[c].item())
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"{'abc'[c]} (12)" for c in order]
    points = {
        (round(float(x), 9), int(y))
        for name, line in lines(axes).items()
        if name.startswith(("measured", "below"))
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert points == {(round(means.value[c].item(), 9), place) for place, c in enumerate(order)}
    segments = [path.vertices.tolist() for path in axes.collections[0].get_paths()]
    for place, c in enumerate(order):
        ends = [means.low[c].item(), means.high[c].item()]
        assert [x for x, _ in segments[place]] == pytest.approx(ends)
    assert list(lines(axes)["1 - alpha"].get_xdata()) == pytest.approx([0.9] * 3)


def test_classes_below_the_promise_are_marked_and_without_a_promise_none_is() -> None:
    report = measured()
    (axes,) = drawn_in(plots.coverage_by_class(report, [0.01, 0.5, 0.01]))
    below = lines(axes)["below what was promised"]
    assert len(below.get_xdata()) == 2
    nothing = [math.nan, 0.5, 0.01]  # a fallback voids the promise for class 0
    (axes,) = drawn_in(plots.coverage_by_class(report, nothing))
    assert len(lines(axes)["below what was promised"].get_xdata()) == 1
    assert sum(math.isnan(x) for x in lines(axes)["1 - alpha"].get_xdata()) == 1
    middle = [1 - value for value in report.classes.mean_of_images.value.tolist()]
    (axes,) = drawn_in(plots.coverage_by_class(report, middle))
    assert "below what was promised" not in lines(axes)
    (axes,) = drawn_in(plots.coverage_by_class(report, None))
    assert set(lines(axes)) == {"measured (95%, over images)"}
    with pytest.raises(InputError, match="one per class, 3; got 2"):
        plots.coverage_by_class(report, [0.1, 0.1])


def test_many_classes_are_cut_to_the_least_covered() -> None:
    (axes,) = drawn_in(plots.coverage_by_class(measured(60), 0.1))
    assert len(axes.get_yticklabels()) == 40
    assert "40 least covered of 60" in axes.get_xlabel()


def test_a_report_without_images_still_draws() -> None:
    empty = Coverage(2).compute()
    assert plots.coverage_by_class(empty, 0.1).axes
    assert plots.coverage_of_images(empty, 0.1).axes
    assert plots.risk_coverage(ConfidenceCounts()).axes
    assert plots.reliability(ConfidenceCounts()).axes


def test_coverage_of_images_draws_every_image_and_the_promise_if_there_is_one() -> None:
    report = measured()
    (axes,) = drawn_in(plots.coverage_of_images(report, 0.1))
    assert list(lines(axes)["an image"].get_ydata()) == report.images.tolist()
    assert set(lines(axes)["1 - alpha"].get_ydata()) == {0.9}
    assert set(lines(axes)["their mean"].get_ydata()) == {report.mean_of_images}
    (axes,) = drawn_in(plots.coverage_of_images(report, None))
    assert "1 - alpha" not in lines(axes)


def test_levels_leave_out_what_is_infinite() -> None:
    thresholds = torch.tensor([[math.inf, 0.9], [0.8, 0.7], [0.5, 0.4]])
    figure = plots.levels([0.05, 0.1, 0.2], thresholds, [3.0, 2.0, 1.5], class_names=["a", "b"])
    above, below = drawn_in(figure)
    first = list(lines(above)["a"].get_ydata())
    assert math.isnan(first[0])
    assert first[1:] == pytest.approx([0.8, 0.5])
    assert list(below.lines[0].get_ydata()) == [3.0, 2.0, 1.5]
    many = plots.levels([0.1], torch.arange(20.0)[None] / 20, [1.0]).axes[0]
    assert list(lines(many)["median of 20 classes"].get_ydata()) == pytest.approx([0.475])
    with pytest.raises(InputError, match="a row per level, 3"):
        plots.levels([0.05, 0.1, 0.2], thresholds[:2], [3.0, 2.0, 1.5])


# --- confidence ---


@given(
    seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]), cut=st.integers(0, 5)
)
def test_confidence_counts_are_those_of_a_loop_over_pixels(
    seed: int, scale: float, cut: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 3, 7, generator=generator) * scale
    labels = torch.randint(3, (5, 7), generator=generator)
    labels[:, 0] = 255
    counts = ConfidenceCounts().update(logits, labels)
    parts = ConfidenceCounts().update(logits[:cut], labels[:cut])
    parts.merge(ConfidenceCounts().update(logits[cut:], labels[cut:]))
    assert torch.equal(parts.pixels, counts.pixels)
    assert torch.equal(parts.right, counts.right)

    known = [(b, x) for b in range(5) for x in range(1, 7)]
    top = logits.double().softmax(1).max(1)
    right = sum(int(top.indices[b, x]) == int(labels[b, x]) for b, x in known)
    assert (int(counts.pixels.sum()), int(counts.right.sum())) == (len(known), right)
    mean = sum(top.values[b, x].item() for b, x in known) / len(known)
    binned = (counts.confidence() * counts.pixels).sum().item() / len(known)
    assert binned == pytest.approx(mean, abs=0.01)

    kept, accuracy = counts.curve()
    assert kept[-1].item() == 1
    assert accuracy[-1].item() == pytest.approx(right / len(known))
    assert (kept.diff() > 0).all()
    sure = top.values[[b for b, _ in known], [x for _, x in known]]
    if float(sure.max()) < 1 - 1e-6:  # its bin then holds what is within 1/64 of its doubt
        near = sum(1 - v <= (1 - float(sure.max())) * (1 + 1 / 32) for v in sure.tolist())
        assert 1 <= round(float(kept[0]) * len(known)) <= near


def test_the_curve_keeps_the_most_confident_first() -> None:
    sure = torch.tensor([0.7, 0.99, 0.6, 0.9])
    logits = torch.stack([sure, 1 - sure], dim=1).log()
    kept, accuracy = ConfidenceCounts().update(logits, torch.tensor([0, 0, 0, 1])).curve()
    assert kept.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert accuracy.tolist() == pytest.approx([1.0, 1 / 2, 2 / 3, 3 / 4])


def test_deciles_are_accuracy_and_confidence_by_step() -> None:
    logits = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]]).log()
    counts = ConfidenceCounts().update(logits, torch.tensor([0, 1, 0, 255]))
    confidence, accuracy, share = counts.deciles()
    assert [round(v, 2) for v in confidence[[6, 9]].tolist()] == [0.65, 0.95]
    assert accuracy[[6, 9]].tolist() == [1.0, 0.5]
    assert [round(v, 3) for v in share[[6, 9]].tolist()] == [0.333, 0.667]
    assert int(confidence.isnan().sum()) == 8


def test_the_certified_point_stands_where_it_was_measured() -> None:
    logits, _, labels = example()
    counts = ConfidenceCounts().update(logits[None], labels[None])
    certified = Certified(kept=0.4, accuracy=0.93, promised=0.9)
    (axes,) = drawn_in(
        plots.risk_coverage(counts, points={"mine": (0.6, 0.7)}, certified=certified)
    )
    found = lines(axes)
    star = found["certified filter, measured"]
    assert (star.get_marker(), *star.get_xdata(), *star.get_ydata()) == ("*", 0.4, 0.93)
    assert set(found["promised of kept labels: 90%"].get_ydata()) == {0.9}
    assert [*found["mine"].get_xdata(), *found["mine"].get_ydata()] == [0.6, 0.7]
    kept, accuracy = counts.curve()
    curve = found["most confident first"]
    assert list(curve.get_xdata()) == kept.tolist()
    assert list(curve.get_ydata()) == accuracy.tolist()
    nothing = Certified(kept=0.0, accuracy=math.nan, promised=0.9)
    (axes,) = drawn_in(plots.risk_coverage(counts, certified=nothing))
    assert "certified filter, measured" not in lines(axes)


def test_the_reliability_diagram_draws_the_deciles() -> None:
    logits, _, labels = example()
    counts = ConfidenceCounts().update(logits[None] * 3, labels[None])
    above, below = drawn_in(plots.reliability(counts))
    confidence, accuracy, share = (x.tolist() for x in counts.deciles())
    steps = [i for i in range(10) if share[i] > 0]
    line = lines(above)["measured"]
    assert list(line.get_xdata()) == [confidence[i] for i in steps]
    assert list(line.get_ydata()) == [accuracy[i] for i in steps]
    assert [bar.get_height() for bar in below.patches] == pytest.approx(share)
    gap = sum(share[i] * abs(confidence[i] - accuracy[i]) for i in steps)
    assert f"mean gap {gap:.3f}" in [text.get_text() for text in above.texts]


# --- training ---


def log_of(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(10, 61, 10):
        stage = "external" if step <= 40 else "self"
        weights = {"labeled_weight": 0.5, "unlabeled_weight": 0.01 * step}
        losses = {"loss": step, "loss_labeled": 2 * step, "loss_unlabeled": 3 * step}
        rows.append({"step": step, "stage": stage, "kept": step / 100, **weights, **losses})
    rows += [{"step": 30, "miou": 0.25}, {"step": 60, "miou": 0.5}]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_draws_the_log(tmp_path: Path) -> None:
    losses, weights, kept, miou = drawn_in(plots.training(log_of(tmp_path)))
    steps = [10, 20, 30, 40, 50, 60]
    assert list(lines(losses)["labeled"].get_xdata()) == steps
    assert list(lines(losses)["unlabeled"].get_ydata()) == [3 * step for step in steps]
    assert list(lines(weights)["unlabeled, lambda"].get_ydata()) == [0.01 * s for s in steps]
    assert list(kept.lines[0].get_ydata()) == [step / 100 for step in steps]
    assert list(zip(*miou.lines[0].get_data(), strict=True)) == [(30, 0.25), (60, 0.5)]
    assert [text.get_text() for text in losses.texts] == ["external", "self"]
    assert [text.xy[0] for text in losses.texts] == [20, 50]  # middles of 0-40 and 40-60


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(FileError, match="must be a trainer's log; No such file"):
        plots.training(path)
    path.write_text("{")
    with pytest.raises(FileError, match="a JSON object per line"):
        plots.training(path)
    path.write_text('{"step": 1, "miou": 0.5}\n[]\n')
    with pytest.raises(FileError, match="at least one step"):
        plots.training(path)


# --- all of them ---


def test_saving_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plots.coverage_of_images(measured(), None)
    plots.save(figure, tmp_path / "a.png")
    plots.save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]

    def stops(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", stops)
    with pytest.raises(KeyboardInterrupt):
        plots.save(figure, tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


PROBE = """
import sys
import matplotlib
def settings():
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != 'backend'}

before = settings()
import torch
from cpseg import plots
logits = torch.zeros(2, 4, 4)
plots.save(plots.one_image(logits, logits == 0), sys.argv[1])
plots.save(plots.reliability(plots.ConfidenceCounts()), sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""


def test_no_pyplot_and_no_global_state(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROBE, str(tmp_path / "a.png")]
    subprocess.run(command, check=True, cwd=root)  # noqa: S603 - our own interpreter and code


def test_without_matplotlib_one_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, sets, _ = example()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"cpseg\[plot\]"):
        plots.one_image(logits, sets)


# What each eye sees of linear red, green and blue: Machado, Oliveira and Fernandes, 2009.
EYES = {
    "all cones": np.eye(3),
    "no long": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no medium": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "no short": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(text: str, eye: str) -> Any:
    """CIELAB of a color as an eye sees it."""
    rgb = np.array(color(text))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(EYES[eye] @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", EYES)
def test_colors_stay_apart_for_every_eye(eye: str) -> None:
    for one, other in combinations([*plots.PALETTE, plots.VOID, "#ffffff"], 2):
        assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 10, (one, other)
    for group in (("#0072b2", "#d55e00"), ("#08519c", "#9ecae1", "#f4f4f4")):
        for one, other in combinations(group, 2):
            assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 20, (one, other)


def test_the_check_of_colors_can_fail() -> None:
    red, green = lab("#b04040", "no medium"), lab("#707040", "no medium")
    apart = lab("#b04040", "all cones") - lab("#707040", "all cones")
    assert np.linalg.norm(red - green) < np.linalg.norm(apart) / 2
