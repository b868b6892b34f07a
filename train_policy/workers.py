"""Processes that work for this one: one thread each, and none that outlives it.

A worker of a pool never hears that the process which employs it was killed: a busy one trains to the end of its task for nobody,
an idle one waits for ever.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread

import torch


def begin_worker() -> None:
    """One thread of torch's; a process that multiprocessing started ends with the one that started it."""
    torch.set_num_threads(1)
    employer = parent_process()
    if employer is not None:
        Thread(target=_end_after, args=(employer,), daemon=True).start()


def _end_after(employer: BaseProcess) -> None:
    employer.join()
    os._exit(1)                                          # at once: nobody waits for what it was working on


def worker_pool(workers: int, begin: Callable[[], None] = begin_worker) -> ProcessPoolExecutor:
    """Spawned processes, each of which calls `begin` first."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin)
