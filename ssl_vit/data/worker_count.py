"""How many loader processes a training process can have, what one of them reads, and how many would keep up."""

from __future__ import annotations

import math
import os
import random
import time
from itertools import count

import numpy as np
import torch

from ssl_vit.config import InputError
from ssl_vit.data.loader import TrainBatches
from ssl_vit.data.processes import cores

TRIED, TRIAL = 256, 0.3
"""Samples and seconds, whichever ends first, that measure how fast a worker is."""


def local_ranks() -> int:
    """Processes of a run on this machine, as launchers say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores_of_a_process() -> int:
    """Cores for the workers of each of the processes on this machine.

    A task of Slurm has cores of its own, bound to it or not; a launcher inside one shares them among its processes.
    """
    sharing, free = local_ranks(), cores()
    if of_a_task := os.environ.get("SLURM_CPUS_PER_TASK"):
        sharing = -(-sharing // int(os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
        free = min(free, int(of_a_task))
    return max(1, free // sharing)


def worker_rate(batches: TrainBatches, item: int) -> float | None:
    """Images/s that one worker reads, decodes and makes views of, measured here; None: nothing could be.

    Args:
        batches: of this process.
        item: the micro-batch to begin with, which the run will read next.
    """
    if any(index.remote(0) for index in batches.indexes):
        return None  # what a server gives now and to one reader says little, and shards would be read here first
    states, threads = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    positions = (position for number in count(item) for position in batches.positions(number))
    try:
        batches.view_at(next(positions), [])  # opens files and libraries
        start, done = time.perf_counter(), 0
        while done < TRIED and time.perf_counter() - start < TRIAL:
            batches.view_at(next(positions), [])
            done += 1
        return done / (time.perf_counter() - start)
    except (InputError, OSError):  # said when the run comes to it, with what helps
        return None
    finally:
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def waiting_advice(share: float, workers: int, images_per_second: float, cores: int) -> str:
    """What lets the loader keep up with steps that wait for it.

    Args:
        share: of the time that the steps wait.
        workers: loader processes of this process.
        images_per_second: of this process.
        cores: that this process has for its workers.
    """
    working = 1 - min(share, 0.99)
    needed = math.ceil(max(workers, 1) / working)
    text = (
        f"steps wait for images {share:.0%} of the time: {workers} workers give {images_per_second:.0f} images/s, the "
        f"steps could take {images_per_second / working:.0f}; run.workers={needed} would keep up"
    )
    if needed > cores:
        text += f", but there are {cores} cores: pack smaller images (pipelines/pack.py resize=384), or use more cores"
    return text
