"""What tests share: one thread per process, the folder of data sets where there is one, and recorded runs."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from mango_env.cache import TrajectoryCache

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests of Ctrl-C need it heard."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run side by side on few cores, and one thread makes sums repeat bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def mango_data() -> Path:
    """The folder of real data sets; the test is skipped where MANGO_DATA does not point to one."""
    folder = os.environ.get("MANGO_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data sets: set MANGO_DATA to the folder that holds them")
    return Path(folder)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> "TrajectoryCache":
    """Runs of mixed quality: see `tests.mixed_data.mixed`."""
    from tests.mixed_data import mixed

    return mixed(tmp_path_factory.mktemp("recorded") / "store")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> "TrajectoryCache":
    """Runs of one deterministic teacher: see `tests.mixed_data.expert`."""
    from tests.mixed_data import expert

    return expert(tmp_path_factory.mktemp("teacher") / "store")


@pytest.fixture(scope="session")
def riddle(tmp_path_factory: pytest.TempPathFactory) -> "TrajectoryCache":
    """Made-up runs with a known answer: see `tests.mixed_data.puzzle`."""
    from tests.mixed_data import puzzle

    return puzzle(tmp_path_factory.mktemp("riddle") / "store")
