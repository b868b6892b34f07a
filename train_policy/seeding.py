"""Other people's global random numbers, borrowed and given back.

Stable-Baselines3 and d3rlpy draw from the global generators of Python, NumPy and PyTorch. Ours is the only code that calls
them, and it does so inside `borrowed_rng`: what a caller of the library draws afterwards does not depend on our training.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def borrowed_rng(seed: int) -> Iterator[None]:
    """Run a block under freshly seeded global generators (Python, NumPy, PyTorch's CPU) and restore all three afterwards."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
