"""One job over many items, in this process or in several.

Work is a picklable function of an iterator over items, such as names; walking the iterator moves
the progress bar. Every process takes every ``jobs``-th item and computes on one thread, so that the parts can
be merged to what a single process gets, to the bit.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TypeVar, cast

import torch

from cpseg import _checks
from cpseg.cli.console import Meter, progress
from cpseg.errors import CpsegError, StateError

__all__ = ["one_thread", "over"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def over(
    items: Sequence[_Item], work: Callable[[Iterable[_Item]], _Result], *, jobs: int, task: str
) -> list[_Result]:
    """Do the work over all items.

    Args:
        items: What there is to do.
        work: Does it for some of them; must be picklable, and so must what it returns.
        jobs: How many processes share it.
        task: What the progress bar says.

    Returns:
        What each process found.

    Raises:
        StateError: If a process died.
    """
    _checks.check_integer("--jobs", jobs, 1)
    jobs = min(jobs, len(items))
    if jobs <= 1:
        with one_thread():
            return [work(progress(items, task))]
    return _shared(items, work, jobs, Meter(len(items), task))


@contextmanager
def one_thread() -> Generator[None]:
    """Compute on one thread: images are small, and threads then cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shared(
    items: Sequence[_Item], work: Callable[[Iterable[_Item]], _Result], jobs: int, meter: Meter
) -> list[_Result]:
    context = get_context("spawn")  # a fork of a process with threads can hang
    # As bytes: tensors among the arguments of a process are shared between all of them, and counts
    # that grow in place would be everyone's.
    own = pickle.dumps(work)
    pipes = [context.Pipe(duplex=False) for _ in range(jobs)]
    processes = [
        context.Process(target=_serve, args=(sender, own, items[start::jobs]), daemon=True)
        for start, (_, sender) in enumerate(pipes)
    ]
    results: dict[int, _Result] = {}
    try:
        with _no_interrupts():
            for process in processes:
                process.start()
        for _, sender in pipes:
            sender.close()
        waiting = {id(receiver): index for index, (receiver, _) in enumerate(pipes)}
        while len(results) < jobs:
            open_ = [pipes[index][0] for index in range(jobs) if index not in results]
            for receiver in cast("list[Connection]", wait(open_)):
                kind, value = _receive(receiver)
                if kind == "step":
                    meter.step()
                elif kind == "refused":
                    raise cast("Exception", value)
                else:
                    results[waiting[id(receiver)]] = cast("_Result", value)
        meter.close()
        return [results[index] for index in range(jobs)]
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _receive(receiver: Connection) -> tuple[str, object]:
    try:
        return cast("tuple[str, object]", pickle.loads(receiver.recv_bytes()))  # noqa: S301 - ours
    except EOFError as error:
        raise StateError(
            "a process of --jobs ended without an answer, perhaps for want of memory; "
            "take fewer --jobs"
        ) from error


def _serve(sender: Connection, pickled: bytes, items: Sequence[_Item]) -> None:
    """What a process does: its share, then its answer."""
    work = cast("Callable[[Iterable[_Item]], object]", pickle.loads(pickled))  # noqa: S301 - ours

    def walk() -> Iterator[_Item]:
        for item in items:
            yield item
            sender.send_bytes(pickle.dumps(("step", None)))

    torch.set_num_threads(1)
    try:
        answer = "done", work(walk())
    except BrokenPipeError:  # nobody waits any more
        os._exit(1)
    except (CpsegError, OSError) as error:
        answer = "refused", error
    sender.send_bytes(pickle.dumps(answer))


@contextmanager
def _no_interrupts() -> Generator[None]:
    """Processes that start here leave Ctrl-C to their parent, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
