"""Two processes are one with twice the batch; a run may go on with another number of them."""

import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpseg.data import SyntheticShapes
from cpseg.errors import InputError
from cpseg.training import (
    Processes,
    Stage,
    TrainConfig,
    Trainer,
    UNet,
    load_checkpoint,
    processes,
    save_checkpoint,
)

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    num_classes=6,
    stages=(
        Stage(name="external", steps=3, denominator="kept"),
        Stage(name="self", steps=3, source="student", strong_views=1, threshold=0.2),
    ),
    crop=(16, 12),
    labeled_batch=1,
    unlabeled_batch=2,
    lr=0.1,
    global_denominator=True,
    evaluate_every=2,
    save_every=1,
)


def trainer(directory: Path, config: TrainConfig) -> Trainer:
    torch.manual_seed(3)
    return Trainer(
        UNet(6, width=4, depth=1),
        config,
        labeled=list(SyntheticShapes(length=5, size=(24, 20), seed=0)),
        unlabeled=list(SyntheticShapes(length=7, size=(24, 20), seed=1)),
        validation=list(SyntheticShapes(length=5, size=(24, 20), seed=2)),
        directory=directory,
        device=CPU,
    )


CHILD = """
import importlib.util, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
for step in tests.trainer(Path(sys.argv[2]), tests.CONFIG).steps(resume=sys.argv[4] == "True"):
    if step.number == int(sys.argv[3]):
        break
torch.distributed.barrier()  # or one may leave while the other still speaks
torch.distributed.destroy_process_group()
"""


def run_two(directory: Path, last: int, *, resume: bool = False) -> str:
    """Two processes up to a step; what the first wrote to its standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    running = [
        subprocess.Popen(  # noqa: S603 - our own interpreter and code
            [sys.executable, "-c", CHILD, __file__, str(directory), str(last), str(resume)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [child.communicate(timeout=120)[1].decode() for child in running]
    assert [child.returncode for child in running] == [0, 0], said
    return said[0]


@pytest.mark.dist
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    run_two(tmp_path / "two", last=6)
    one = trainer(tmp_path / "one", replace(CONFIG, labeled_batch=2, unlabeled_batch=4))
    one.fit()
    two = load_checkpoint(tmp_path / "two" / "last.pt")
    ours = load_checkpoint(tmp_path / "one" / "last.pt")
    for name, value in ours["student"].items():
        # Kernels add up a batch of another size in another order, each processor's in its own: up
        # to 1.5e-6 has been seen. Denominators of each process by itself would be off by 2e-2.
        assert torch.allclose(two["student"][name], value, rtol=0, atol=1e-5), name
    assert (two["labeled_seen"], two["unlabeled_seen"]) == (12, 24)
    assert two["best"][0] == pytest.approx(ours["best"][0], abs=1e-3)
    assert len(two["random"]) == 2


@pytest.mark.dist
def test_a_run_of_two_goes_on_alone_and_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_two(tmp_path, last=4)
    caplog.set_level(logging.WARNING, logger="cpseg")
    alone = trainer(tmp_path, CONFIG)
    assert alone.fit(resume=True).steps == 6
    assert "written by 2 processes and is resumed by 1" in caplog.text
    assert "1 labeled and 2 unlabeled images instead of 2 and 4" in caplog.text
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["labeled_seen"], state["unlabeled_seen"]) == (4 * 2 + 2, 4 * 4 + 2 * 2)


@pytest.mark.dist
def test_a_run_of_one_goes_on_as_two_with_the_next_samples_and_says_what_differs(
    tmp_path: Path,
) -> None:
    for step in trainer(tmp_path / "one", CONFIG).steps():
        if step.number == 2:
            break
    start = load_checkpoint(tmp_path / "one" / "last.pt")
    said = run_two(tmp_path / "one", last=6, resume=True)
    assert "written by 1 process and is resumed by 2" in said
    assert "2 labeled and 4 unlabeled images instead of 1 and 2" in said
    # From there on, two processes are one with twice the batch.
    doubled = replace(CONFIG, labeled_batch=2, unlabeled_batch=4)
    (tmp_path / "doubled").mkdir()
    save_checkpoint(tmp_path / "doubled" / "last.pt", {**start, "run": doubled.fingerprint()})
    trainer(tmp_path / "doubled", doubled).fit(resume=True)
    two, ours = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "doubled"))
    assert two["labeled_seen"] == ours["labeled_seen"] == 2 + 4 * 2
    assert two["unlabeled_seen"] == ours["unlabeled_seen"] == 4 + 4 * 4
    for name, value in ours["student"].items():
        # Kernels add up a batch of another size in another order, each processor's in its own: up
        # to 1.5e-6 has been seen. Denominators of each process by itself would be off by 2e-2.
        assert torch.allclose(two["student"][name], value, rtol=0, atol=1e-5), name
    assert len(two["random"]) == 2


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes(CPU) == Processes()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="RANK and WORLD_SIZE must both be set; got only RANK"):
        processes(CPU)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes(CPU) == Processes()
