"""Worker processes of a loader: started, watched, and named when one dies or stands still."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.sharedctypes import RawArray
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ssl_vit.config import InputError
from ssl_vit.data.collating import Batch, SharedSlots
from ssl_vit.data.remote import ReadError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
DUMP = signal.SIGUSR2
"""Makes a worker print its stacks."""
PREFETCH = 4
"""Batches that a worker makes ahead."""
SLOTS = PREFETCH + 1
"""Batches in a worker's shared memory: those made ahead of the one that its loader has copied last."""
STALL = 1800.0
"""Seconds without a batch after which a loader is given up; longer than any retrying of a request."""
CHECK = 5.0
"""Seconds until a worker's death is noticed."""
PATIENCE = 1.0
"""Seconds in which workers should have ended."""
LIKELY_CAUSES = {
    signal.SIGKILL: "most likely the machine ran out of memory; lower run.workers, or ask for more memory",
    signal.SIGBUS: "/dev/shm is too small; enlarge it (docker run --shm-size=8g), or lower run.workers",
}


class LoaderFailed(Exception):
    """The next batch cannot be had, and no sample is at fault: a run saves and stops, and can be started again."""


class Batches(Protocol):
    """What a loader reads."""

    reading: Any
    """Where a process notes the source and sample that it reads."""
    stack: Any
    """Makes a batch of views."""

    def __getitem__(self, item: int) -> tuple[Batch, Any]:
        """A batch, and what is to be said about it."""
        ...

    def name(self, source: int, sample: int) -> str:
        """What people call a sample."""
        ...


class _Guarded(Dataset):
    """Batches, or the error instead where a worker would send it with its traceback as text.

    Args:
        batches: what is read.
        places: two numbers a worker, shared with the main process.
    """

    def __init__(self, batches: Batches, places: Any) -> None:
        self.batches, self.places, self.begun = batches, places, False

    def __getitem__(self, item: int) -> Any:
        """A batch or error."""
        worker = get_worker_info()
        if worker is not None and not self.begun:
            self.begun = True
            self.batches.stack = SharedSlots(SLOTS)
            self.batches.reading = memoryview(self.places).cast("B").cast("q")[2 * worker.id : 2 * worker.id + 2]
        try:
            return self.batches[item]
        except (InputError, ReadError) as error:
            return error


class WatchedBatches(Iterator[Any]):
    """Batches in order, made by worker processes that ignore the signals which stop a run.

    Args:
        batches: what is read.
        items: which, in order.
        workers: processes; 0: this one.
        pin_memory: for copies to a GPU.
        stall_timeout: seconds without a batch after which the workers are given up.

    Raises:
        LoaderFailed: on reading: a shard cannot be read, a worker died or stands still.
    """

    def __init__(
        self, batches: Batches, items: Sequence[int], workers: int, pin_memory: bool, stall_timeout: float
    ) -> None:
        workers = min(workers, len(items))
        self.batches, self.stall_timeout = batches, stall_timeout
        self.places = RawArray("q", [0, -1] * max(workers, 1))
        loader = DataLoader(
            _Guarded(batches, self.places),
            batch_size=None,
            sampler=items,  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=begin_worker if workers else None,
            prefetch_factor=PREFETCH if workers else None,
            timeout=min(stall_timeout, CHECK) if workers else 0,
            # an own generator: the loader's base seed must not be drawn from the generator of the training step
            generator=torch.Generator(),
        )
        self._iterator = start_workers(loader)
        self._lent = workers > 0 and not getattr(self._iterator, "_pin_memory", False)  # pinned batches are copies

    @property
    def _workers(self) -> list[Any]:
        return getattr(self._iterator, "_workers", [])

    def __next__(self) -> Any:
        """The next batch."""
        found = self._wait()
        if isinstance(found, ReadError):
            raise LoaderFailed(str(found))
        if isinstance(found, InputError):
            raise found
        batch, reports = found
        return {key: value.clone() for key, value in batch.items()} if self._lent else batch, reports

    def _wait(self) -> Any:
        start = time.monotonic()
        while True:
            try:
                return next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: of a connection to a dead worker
                if str(error).startswith("DataLoader timed out"):
                    if time.monotonic() - start < self.stall_timeout:
                        continue  # torch has seen that all workers are alive
                    reason = self._stalled()
                elif (reason := self._died()) is None:
                    raise
            raise LoaderFailed(reason)

    def _died(self) -> str | None:
        """Which worker ended before its time, and why; None if none does within a moment."""
        ended = connection.wait([worker.sentinel for worker in self._workers], timeout=PATIENCE if self._workers else 0)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join(PATIENCE)  # its files are closed a little before it has ended
        codes = [(number, worker.exitcode) for number, worker in enumerate(self._workers) if worker.exitcode]
        if not codes:
            return None
        number, code = codes[0]
        if code > 0:
            return f"loader worker {number} ended with exit code {code} while reading {self._place(number)}"
        name = signal.Signals(-code).name
        cause = LIKELY_CAUSES.get(signal.Signals(-code), "see its messages above")
        return f"loader worker {number} was killed by {name} while reading {self._place(number)}: {cause}"

    def _stalled(self) -> str:
        """Print the stacks of this process and its workers, and say what they wait for."""
        print(f"no batch for {self.stall_timeout:g} s; stacks of all processes:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)  # pyright: ignore[reportArgumentType]
        places = []
        for number, worker in enumerate(self._workers):
            if worker.is_alive():
                print(f"loader worker {number}, pid {worker.pid}:", file=sys.__stderr__, flush=True)
                os.kill(worker.pid, DUMP)
                time.sleep(0.2)  # one after another
                places.append(f"worker {number} at {self._place(number)}")
        return f"no batch for run.stall_timeout={self.stall_timeout:g} s, the stacks are above; {', '.join(places)}"

    def _place(self, worker: int) -> str:
        source, sample = self.places[2 * worker : 2 * worker + 2]
        return self.batches.name(source, sample) if sample >= 0 else "its first sample"

    def __del__(self) -> None:
        # torch asks its workers to end, and waits for those that stand still or try a server again
        busy = [worker for worker in self._workers if worker.is_alive()] if hasattr(self, "_iterator") else []
        if busy:
            end = threading.Timer(PATIENCE, _kill, [busy])
            end.daemon = True
            try:
                end.start()
            except RuntimeError:  # the interpreter is about to exit
                _kill(busy)


_open: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Before multiprocessing waits for workers that it asked to end with a signal that they ignore."""
    for iterator in _open:
        _kill(getattr(iterator, "_workers", []))


def _kill(workers: Sequence[Any]) -> None:
    """End workers, which ignore every other signal."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """Start the processes of a loader whose workers begin with :func:`begin_worker`; called in the main thread."""
    # Meanwhile only noted: a signal must not find a worker that does not ignore it yet, nor a fork, whose hooks swallow
    # what a handler raises. A mask would not do: it holds for one thread.
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in STOPPING}
    noticed = signal.getsignal(signal.SIGCHLD)
    try:
        iterator = iter(loader)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _open.add(iterator)
    if signal.getsignal(signal.SIGCHLD) is not noticed:
        # torch would raise wherever this process is when a worker dies, also in the middle of a step; the batch that
        # is missing tells as well
        signal.signal(signal.SIGCHLD, noticed or signal.SIG_DFL)
    for number in arrived:
        signal.raise_signal(number)
    return iterator


def begin_worker(worker: int) -> None:
    """One thread a worker; stopping is the main process's to handle."""
    torch.set_num_threads(1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(DUMP, file=sys.__stderr__, all_threads=True)  # pyright: ignore[reportArgumentType]
