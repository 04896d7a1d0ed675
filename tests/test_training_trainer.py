"""The trainer: resumed runs to the bit, batches by position, evaluation, bad input."""

import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpseg.data import SegmentationFolder, SyntheticShapes
from cpseg.data.transforms import RandomCrop
from cpseg.errors import FileError, InputError, StateError
from cpseg.training import (
    Batches,
    BatchKey,
    Evaluation,
    MovingAverage,
    Normalize,
    Processes,
    Stage,
    TrainConfig,
    Trainer,
    UNet,
    evaluate,
    load,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from cpseg.training.recipes import conformal_sam, self_training, supervised, unimatch_like

CPU = torch.device("cpu")


class Pairs:
    """Images and labels held in memory."""

    def __init__(self, items: list[tuple[Tensor, Tensor]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        return self.items[index]


def pairs(length: int, seed: int, size: tuple[int, int] = (24, 20)) -> Pairs:
    return Pairs(list(SyntheticShapes(length=length, size=size, seed=seed)))


class Student(nn.Module):
    """Batch statistics, dropout and a head: everything that a resumed run must put back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2)
        )
        self.head = nn.Conv2d(6, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))  # type: ignore[no-any-return]


CONFIG = TrainConfig(
    num_classes=6,
    stages=(
        Stage(name="external", steps=5, cutmix=0.5),
        Stage(name="self", steps=4, source="teacher", strong_views=1, merge="fill"),
    ),
    crop=(16, 12),
    labeled_batch=2,
    unlabeled_batch=3,
    accumulate=2,
    ema_decay=0.9,
    head_multiplier=3.0,
    clip=1.0,
    evaluate_every=2,
    save_every=1,
    log_every=1,
)


def trainer(directory: Path, config: TrainConfig = CONFIG) -> Trainer:
    torch.manual_seed(11)
    return Trainer(
        Student(),
        config,
        labeled=pairs(5, 0),
        unlabeled=pairs(7, 1),
        validation=pairs(3, 2),
        directory=directory,
        device=CPU,
    )


def tensors(state: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint, by its path."""
    if isinstance(state, dict):
        leaves = [tensors(value, f"{name}/{key}") for key, value in state.items()]
    elif isinstance(state, (list, tuple)):
        leaves = [tensors(value, f"{name}/{index}") for index, value in enumerate(state)]
    else:
        return {name: state}
    return {path: leaf for each in leaves for path, leaf in each.items()}


def assert_same(a: Path, b: Path) -> None:
    one, other = (tensors(load_checkpoint(path / "last.pt")) for path in (a, b))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name] or value != value, name  # noqa: PLR0124 - NaN
    logs = []
    for path in (a, b):
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    assert logs[0] == logs[1]


# Kills itself: after a step, or in the middle of writing that step's checkpoint.
CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("resumed", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
directory, last, where = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
trainer = tests.trainer(directory)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "write":
    flush = os.fsync
    def half(file):
        if trainer.number == last:
            os.ftruncate(file, 1000)
            die()
        flush(file)
    os.fsync = half
for step in trainer.steps(resume=True):
    if where == "step" and step.number == last:
        die()
"""


def run_until_killed(directory: Path, last: int, where: str) -> None:
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", CHILD, __file__, str(directory), str(last), where],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.dist
def test_a_run_killed_five_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    # Other places each time; those of a run that failed come back with its seed.
    seed = int(os.environ.get("CPSEG_KILL_SEED") or random.SystemRandom().randrange(2**32))
    chance = random.Random(seed)  # noqa: S311 - places, not secrets
    lasts = sorted(chance.sample(range(1, 9), 5))
    during = {lasts[-1], *chance.sample(lasts[1:], 1)}  # the first write has none to fall back on
    places = [(last, "write" if last in during else "step") for last in lasts]
    print(f"CPSEG_KILL_SEED={seed}: {places}")  # noqa: T201 - shown where the test fails
    straight = trainer(tmp_path / "straight")
    result = straight.fit()
    killed = tmp_path / "killed"
    for last, where in places:
        run_until_killed(killed, last, where)
        found = load_checkpoint(killed / "last.pt")["number"]
        assert found == (last if where == "step" else last - 1)
    resumed = trainer(killed)
    assert resumed.fit(resume=True) == result
    assert_same(tmp_path / "straight", killed)
    assert not (killed / "last.pt.part").exists()


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_leaving_the_loop_and_resuming_changes_no_bit(tmp_path: Path, stop: int) -> None:
    config = replace(CONFIG, save_every=3)
    straight = trainer(tmp_path / "a", config).fit()
    for step in trainer(tmp_path / "b", config).steps():
        if step.number == stop:
            break
    torch.rand(17)  # whatever happens in between
    assert trainer(tmp_path / "b", config).fit(resume=True) == straight
    assert_same(tmp_path / "a", tmp_path / "b")


def test_workers_and_what_is_kept_change_no_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate=1)
    a = trainer(tmp_path / "a", config).fit()
    b = trainer(tmp_path / "b", replace(config, workers=2, save_every=None)).fit()
    assert a == b
    assert_same(tmp_path / "a", tmp_path / "b")


def test_the_loops_body_sees_each_step_after_its_checkpoint(tmp_path: Path) -> None:
    seen: list[tuple[int, str, bool]] = []
    for step in trainer(tmp_path).steps():
        assert load_checkpoint(tmp_path / "last.pt")["number"] == step.number
        assert step.loss.ndim == 0
        assert step.metrics.keys() == {"loss_labeled", "loss_unlabeled", "kept"}
        seen.append((step.number, step.stage, step.evaluation is not None))
    names = ["external"] * 5 + ["self"] * 4
    assert seen == [(n, names[n - 1], n in (2, 4, 6, 8, 9)) for n in range(1, 10)]
    best = load_checkpoint(tmp_path / "best.pt")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["miou"] for line in lines if "miou" in line}
    assert best["miou"] == max(scores.values())
    assert lines[-1]["of"] == "teacher"
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([1e-3 * (1 - n / 9) ** 0.9 for n in range(9)])


def test_resuming_needs_to_be_asked_for_and_the_same_configuration(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    with pytest.raises(StateError, match="must hold no run yet"):
        trainer(tmp_path).fit()
    with pytest.raises(FileError, match="another configuration"):
        trainer(tmp_path, replace(CONFIG, lr=0.5)).fit(resume=True)
    done = trainer(tmp_path)
    assert done.fit(resume=True).steps == 9
    with pytest.raises(StateError, match="iterated once"):
        done.fit(resume=True)


def test_training_stops_early_and_stays_stopped(tmp_path: Path) -> None:
    config = replace(supervised(6, steps=9, crop=(8, 8)), lr=0.0, patience=2, evaluate_every=1)

    def still() -> Trainer:
        torch.manual_seed(0)
        student = UNet(6, width=4, depth=1)
        data = pairs(2, 0)
        return Trainer(
            student, config, labeled=data, validation=data, directory=tmp_path, device=CPU
        )

    result = still().fit()
    assert (result.steps, result.best_step, result.stopped) == (3, 1, True)
    assert still().fit(resume=True) == result


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_precisions_and_optimizers_learn(tmp_path: Path, precision: Any, optimizer: Any) -> None:
    lr = 0.1 if optimizer == "sgd" else 0.02
    config = replace(
        supervised(6, steps=40, crop=(16, 16)),
        precision=precision,
        optimizer=optimizer,
        lr=lr,
        labeled_batch=8,
    )
    torch.manual_seed(0)
    run = Trainer(
        UNet(6, width=4, depth=1), config, labeled=pairs(4, 0), directory=tmp_path, device=CPU
    )
    losses = [step.loss.item() for step in run.steps()]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert math.isnan(run.result().best_miou)  # nothing to measure on


def test_a_compiled_student_trains_as_an_eager_one_and_is_evaluated_eagerly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[bool, tuple[int, ...]]] = []

    def compile_(module: nn.Module) -> None:  # without the minute that generating code takes
        def call(images: Tensor) -> Any:
            shapes.append((module.training, tuple(images.shape)))
            return module.forward(images)

        module._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_)
    stages = (CONFIG.stages[0], replace(CONFIG.stages[1], source="student"))
    config = replace(CONFIG, stages=stages, ema_decay=None, accumulate=1)
    eager, compiled = (
        trainer(tmp_path / str(flag), replace(config, compile=flag)) for flag in (False, True)
    )
    assert eager.fit() == compiled.fit()
    for name, value in eager.student.state_dict().items():
        assert torch.equal(compiled.student.state_dict()[name], value), name
    # Both stages train on five crops at once, the second labels three of them first.
    assert (
        shapes
        == [(True, (5, 3, 16, 12))] * 5 + [(False, (3, 3, 16, 12)), (True, (5, 3, 16, 12))] * 4
    )


def test_one_step_by_hand(tmp_path: Path) -> None:
    config = replace(
        supervised(6, steps=4, crop=(16, 16)), lr=0.1, head_multiplier=3.0, accumulate=2, clip=0.5
    )
    torch.manual_seed(0)
    run = Trainer(
        UNet(6, width=4, depth=1), config, labeled=pairs(5, 0), directory=tmp_path, device=CPU
    )
    twin = UNet(6, width=4, depth=1)
    twin.load_state_dict(run.student.state_dict())
    for step in run.steps():
        del step
        break
    loss = torch.zeros(())
    for place in (0, 2):
        batch = run.batches[BatchKey(place, 0, 2, 0, 0)]
        loss = (
            loss
            + nn.functional.cross_entropy(twin(batch.images), batch.labels, ignore_index=255) / 2
        )
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([p.grad.norm() for p in twin.parameters() if p.grad is not None]).norm()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad * min(1, 0.5 / float(norm)) + 1e-4 * parameter.detach()
        rate = 0.3 if name.startswith("head.") else 0.1
        after = run.student.get_parameter(name)
        assert torch.allclose(after, parameter - rate * gradient, atol=1e-6), name


def test_the_averaged_teacher_in_closed_form() -> None:
    network = nn.BatchNorm1d(1)
    average = MovingAverage(network, 0.7)
    expected = 1.0
    for t, value in enumerate([3.0, -1.0, 4.0, 1.0, 5.0], start=1):
        with torch.no_grad():
            network.weight.fill_(value)
            network.running_mean.fill_(2 * value)  # type: ignore[union-attr]
            network.num_batches_tracked.fill_(t)  # type: ignore[union-attr]
        average.update(network)
        decay = min(1 - 1 / (t + 1), 0.7)
        expected = decay * expected + (1 - decay) * value
        assert float(average.module.get_parameter("weight").detach()) == pytest.approx(
            expected, rel=1e-6
        )
        assert int(average.module.get_buffer("num_batches_tracked")) == t
    assert not average.module.training
    with pytest.raises(InputError, match="decay must"):
        MovingAverage(network, 1.0)


# --- batches --------------------------------------------------------------------------------------


def batches(labeled: Any = None, unlabeled: Any = None, **rest: Any) -> Batches:
    return Batches(
        labeled or pairs(5, 0),
        unlabeled,
        num_classes=6,
        crop=RandomCrop((8, 12)),
        **rest,
    )


def test_every_pass_sees_every_image_once_in_an_order_of_its_own() -> None:
    class Counting(Pairs):
        def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
            asked.append(index)
            return self.items[index]

    asked: list[int] = []
    source = batches(Counting(pairs(5, 0).items))
    for place in range(0, 15, 3):
        source[BatchKey(place, 0, 3, 0, 0)]
    passes = [asked[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(each) == list(range(5)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_probabilities_move_as_labels_do() -> None:
    hard = pairs(4, 1).items
    soft = [(i, torch.stack([label == c for c in range(6)]).half()) for i, label in hard]
    key = BatchKey(0, 0, 1, 40, 0)
    made = batches(unlabeled=hard)[key]
    shares = batches(unlabeled=soft)[key].external
    assert shares.dtype == torch.float32
    assert torch.equal(shares, torch.stack([made.external == c for c in range(6)], 1).float())
    assert not bool(made.valid.all())  # outside the image too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:5], "probabilities must have shape"),
        (lambda p: p * 1.1, "add up to 1"),
        (lambda p: torch.stack((p[0] - 2, p[1] + 2, *p[2:])), "at least 0"),
        (lambda p: p * math.nan, "add up to 1"),
    ],
)
def test_what_are_no_probabilities_is_refused(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    image = pairs(1, 1).items[0][0]
    even = torch.full((6, *image.shape[1:]), 1 / 6)
    batches(unlabeled=[(image, even), (image, even * 0)])[BatchKey(0, 0, 1, 2, 0)]
    with pytest.raises(InputError, match=message):
        batches(unlabeled=[(image, change(even))])[BatchKey(0, 0, 1, 1, 0)]


def test_labels_and_probabilities_do_not_mix() -> None:
    image, label = pairs(1, 1).items[0]
    even = torch.full((6, *image.shape[1:]), 1 / 6)
    with pytest.raises(InputError, match="got both in one batch"):
        batches(unlabeled=[(image, label), (image, even)])[BatchKey(0, 0, 1, 2, 0)]


def test_a_sample_depends_on_its_position_alone() -> None:
    source = batches(unlabeled=pairs(4, 1))
    whole = source[BatchKey(3, 6, 4, 4, 1)]
    for i in range(4):
        one = batches(unlabeled=pairs(4, 1))[BatchKey(3 + i, 6 + i, 1, 1, 1)]
        assert torch.equal(one.images[0], whole.images[i])
        assert torch.equal(one.labels[0], whole.labels[i])
        assert torch.equal(one.strong[0][0], whole.strong[0][i])
        assert torch.equal(one.valid[0], whole.valid[i])
        assert torch.equal(one.external[0], whole.external[i])
    assert not torch.equal(whole.strong[0], whole.weak)


def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    keys = [BatchKey(place, 0, 1, 0, 0) for place in range(3)]
    assert len(list(load(batches(), keys, workers=0, pin_memory=False))) == 3
    assert torch.equal(torch.get_rng_state(), before)


IMAGE, LABEL = torch.zeros(3, 9, 7, dtype=torch.uint8), torch.zeros(9, 7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(IMAGE, LABEL + 6)], r"labeled\[0\]'s labels must be classes in \[0, 6\) or 255; got 6"),
        ([(IMAGE, LABEL - 1)], "got -1 to -1"),
        ([(IMAGE, LABEL[:5])], r"labeled\[0\]'s labels must have shape \(9, 7\)"),
        ([(IMAGE.float(), LABEL)], r"labeled\[0\] must hold an image uint8"),
        ([(IMAGE[0], LABEL)], r"labeled\[0\] must hold an image uint8"),
    ],
)
def test_bad_items_are_named(items: list[tuple[Tensor, Tensor]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batches(Pairs(items))[BatchKey(0, 0, 1, 0, 0)]


def test_empty_and_missing_sets_are_refused(tmp_path: Path) -> None:
    config = conformal_sam(6, external_steps=1, self_steps=1, crop=(8, 8))
    some, none = pairs(1, 1), Pairs([])
    for labeled, unlabeled, validation, name in (
        (none, some, None, "labeled must hold"),
        (some, none, None, "unlabeled must hold"),
        (some, None, None, "unlabeled must be a dataset"),
        (some, some, none, "validation must hold"),
    ):
        with pytest.raises(InputError, match=name):
            Trainer(
                Student(),
                config,
                labeled=labeled,
                unlabeled=unlabeled,
                validation=validation,
                directory=tmp_path,
                device=CPU,
            )
    with pytest.raises(InputError, match="unlabeled must be a dataset"):
        batches()[BatchKey(0, 0, 1, 1, 0)]


def on_disk(root: Path, length: int, **options: Any) -> SegmentationFolder:
    """Pictures in a folder, and their masks."""
    pillow = pytest.importorskip("PIL.Image")
    found = []
    for index, (image, label) in enumerate(SyntheticShapes(length=length, size=(20, 24), seed=0)):
        pillow.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"{index}.png")
        pillow.fromarray(label.byte().numpy()).save(root / f"m{index}.png")
        found.append((f"{index}.png", f"m{index}.png"))
    return SegmentationFolder(root=root, pairs=found, num_classes=6, **options)


def test_every_wrong_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    folder = on_disk(tmp_path, 4)
    for gone in ("1.png", "m2.png"):
        (tmp_path / gone).unlink()
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    run = Trainer(
        Student(),
        replace(CONFIG, head_multiplier=1.0),
        labeled=folder,
        unlabeled=pairs(3, 1),
        validation=folder,
        directory=tmp_path / "run",
        device=CPU,
    )
    with pytest.raises(FileError, match="sound files; got 6 that are not") as found:
        run.fit()
    for name in ("labeled", "validation"):
        for file in ("1.png is missing", "m2.png is missing", "3.png is damaged"):
            assert any(
                line.startswith(f"{name}: ") and f"/{file}" in line
                for line in str(found.value).splitlines()
            )
    assert not (tmp_path / "run").exists()


def test_folders_without_labels_are_refused_where_labels_are_needed(tmp_path: Path) -> None:
    folder = on_disk(tmp_path, 2)
    bare = replace(folder, pairs=[(image, None) for image, _ in folder.pairs])
    external = conformal_sam(6, external_steps=1, self_steps=1, crop=(8, 8))
    own = self_training(6, warmup_steps=1, steps=1, crop=(8, 8))
    sets: dict[str, Any] = {"labeled": folder, "unlabeled": folder, "validation": folder}
    for name in sets:
        options: dict[str, Any] = {**sets, name: bare}
        with pytest.raises(InputError, match=f"{name} must have labels"):
            Trainer(Student(), external, **options, directory=tmp_path / "a")
    for change in ({"config": own}, {"annotator": Student()}):  # not asked here
        options = {"config": external, **sets, "unlabeled": bare, **change}
        Trainer(Student(), **options, directory=tmp_path / "b")


def test_labels_for_a_later_stage_that_joins_probabilities_are_refused_at_once(
    tmp_path: Path,
) -> None:
    config = conformal_sam(6, external_steps=5, self_steps=1, crop=(8, 8), merge="pool")
    run = Trainer(Student(), config, labeled=pairs(2, 1), unlabeled=pairs(2, 1), directory=tmp_path)
    with pytest.raises(InputError, match="must be probabilities for merge 'pool' of stage 'self'"):
        run.fit()
    assert run.number == 0


def test_a_student_with_other_classes_is_refused_at_its_first_step(tmp_path: Path) -> None:
    for config in (
        supervised(8, steps=1, crop=(8, 8)),
        conformal_sam(8, external_steps=1, self_steps=1, crop=(8, 8)),
    ):
        run = Trainer(
            Student(), config, labeled=pairs(2, 1), unlabeled=pairs(2, 1), directory=tmp_path
        )
        with pytest.raises(InputError, match="student must give logits of 8 classes; got 6"):
            run.fit()


# --- evaluation -----------------------------------------------------------------------------------


def miou_by_hand(pairs_: list[tuple[int, int]], classes: int) -> tuple[float, float]:
    shares = []
    for c in range(classes):
        both = sum(a == c and b == c for a, b in pairs_)
        either = sum(c in pair for pair in pairs_)
        shares.append(both / either if either else float("nan"))
    seen = [share for share in shares if share == share]  # noqa: PLR0124 - NaN
    return sum(seen) / len(seen), sum(seen) / classes


class Looks(nn.Module):
    """Predicts the first channel's value; 4 classes on a grid of half the size."""

    def forward(self, images: Tensor) -> Tensor:
        classes = torch.arange(4).view(4, 1, 1)
        return -(images[:, :1] * 255 - classes).abs()


def test_miou_by_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    items, every = [], []
    for height, width in ((3, 5), (4, 7), (1, 2)):
        image = torch.randint(0, 3, (3, height, width), generator=g, dtype=torch.uint8)
        label = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (height, width), generator=g)]
        items.append((image, label))
        shown = zip(label.flatten().tolist(), image[0].flatten().tolist(), strict=True)
        every += [pair for pair in shown if pair[0] != 255]
    plain = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for divisor in (1, 4):
        found = evaluate(Looks(), Pairs(items), num_classes=4, normalize=plain, divisor=divisor)
        assert (found.miou, found.miou_absent_as_zero) == pytest.approx(miou_by_hand(every, 4))
    assert int(found.confusion.sum()) == len(every)


def test_processes_share_the_images_and_count_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value)
    data = pairs(5, 0)
    torch.manual_seed(0)
    network = UNet(6, width=4, depth=1)
    whole = evaluate(network, data, num_classes=6).confusion
    shares = [
        evaluate(network, data, num_classes=6, processes=Processes(rank, 2)).confusion
        for rank in range(2)
    ]
    assert torch.equal(shares[0] + shares[1], whole)
    assert int(shares[0].sum()) > int(shares[1].sum()) > 0


def test_evaluation_refuses_labels_and_logits_that_are_no_classes() -> None:
    with pytest.raises(InputError, match="got 63 pixels that are neither"):
        evaluate(Looks(), Pairs([(IMAGE, LABEL + 4)]), num_classes=4)
    with pytest.raises(InputError, match="must have C = 5 classes"):
        evaluate(Looks(), Pairs([(IMAGE, LABEL)]), num_classes=5)
    with pytest.raises(InputError, match="at least one image"):
        evaluate(Looks(), Pairs([]), num_classes=4)


def test_an_absent_class_counts_as_zero_in_one_mean_alone() -> None:
    found = Evaluation(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert found.iou.tolist()[:2] == [0.75, 0.8]
    assert found.miou == pytest.approx(0.775)
    assert found.miou_absent_as_zero == pytest.approx(1.55 / 3)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"a": torch.arange(3)})

    def full(file: int) -> None:
        raise OSError(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\d"):
        save_checkpoint(path, {"a": torch.arange(4)})
    monkeypatch.undo()
    assert load_checkpoint(path)["a"].tolist() == [0, 1, 2]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"a": torch.arange(300)})
    content = path.read_bytes()
    for damaged in (b"", b"no", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="not a cpseg checkpoint"):
            load_checkpoint(path)
    torch.save({"a": 1}, path)
    with pytest.raises(FileError, match="is not a cpseg checkpoint"):
        load_checkpoint(path)
    torch.save({"format": "cpseg checkpoint", "version": 99}, path)
    with pytest.raises(FileError, match="version 99"):
        load_checkpoint(path)


def test_random_states_return(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002, S311

    save_checkpoint(tmp_path / "r.pt", random_state(CPU))
    first = draw()
    set_random_state(load_checkpoint(tmp_path / "r.pt"), CPU)
    assert draw() == first


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_run_and_are_what_they_say(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    recipes = [
        conformal_sam(6, external_steps=2, self_steps=2, crop=(16, 16)),
        conformal_sam(
            6, external_steps=2, self_steps=2, crop=(16, 16), own="probabilities", ema_decay=0.9
        ),
        supervised(6, steps=2, crop=(16, 16)),
        self_training(6, warmup_steps=1, steps=2, crop=(16, 16)),
        unimatch_like(6, steps=2, crop=(16, 16), perturb=("down.0", "stem")),
    ]
    for index, config in enumerate(recipes):
        run = Trainer(
            UNet(6, width=4, depth=1),
            config,
            labeled=pairs(3, 0),
            unlabeled=pairs(3, 1),
            directory=tmp_path / str(index),
            device=CPU,
        )
        assert all(bool(step.loss.isfinite()) for step in run.steps())
    self_reliance = recipes[0].stages[1]
    stages = [config.stages[1] for config in recipes[:2]]
    assert [stage.source for stage in stages] == ["student", "teacher"]
    assert [stage.own for stage in stages] == ["labels", "probabilities"]
    both = conformal_sam(6, external_steps=2, self_steps=2, crop=(16, 16), merge="pool").stages[1]
    assert both == replace(self_reliance, merge="pool")
    total = self_reliance.labeled_weight(0.3) + self_reliance.unlabeled_weight(0.3)
    assert total == pytest.approx(1)
    assert self_reliance.unlabeled_weight(1.0) == pytest.approx(0.5 / 2.718281828)
    assert not caplog.records


def test_a_batch_of_one_trains(tmp_path: Path) -> None:
    config = replace(
        unimatch_like(6, steps=2, crop=(8, 8), perturb=("stem",)),
        labeled_batch=1,
        unlabeled_batch=1,
    )
    run = Trainer(
        UNet(6, width=4, depth=3),
        config,
        labeled=pairs(1, 0),
        unlabeled=pairs(1, 1),
        directory=tmp_path,
        device=CPU,
    )
    assert run.fit().steps == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must"),
        ({"precision": "fp8"}, "precision must"),
        ({"clip": 0.0}, "clip must"),
        ({"ema_decay": None}, "ema_decay must be given"),
        ({"accumulate": 0}, "accumulate must"),
        ({"lr": float("nan")}, "lr must"),
        ({"ignore_index": 3}, "ignore_index must"),
        ({"stages": ()}, "stages must"),
        ({"workers": -1}, "workers must"),
        ({"patience": 0}, "patience must"),
        ({"class_weights": (1.0, 1.0)}, "class_weights must be 6, one per class; got 2"),
        ({"class_weights": (*(1.0,) * 5, -1.0)}, r"class_weights\[5\] must be finite"),
    ],
)
def test_configurations_refuse_what_they_cannot_mean(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **change)


def test_a_head_must_exist_to_learn_faster(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="head must name parameters"):
        trainer(tmp_path, replace(CONFIG, head=("decoder",)))
