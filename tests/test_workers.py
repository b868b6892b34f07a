"""Workers end with the process that started them, busy or idle."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from train_policy.workers import worker_pool

EMPLOYER = """
import os, sys, time
from train_policy.workers import worker_pool

if __name__ == "__main__":
    pool = worker_pool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    if sys.argv[1] == "busy":
        pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def running(pid: int) -> bool:
    """A zombie that nobody has collected yet is at its end as well."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
@pytest.mark.parametrize("state", ["busy", "idle"])
def test_a_worker_ends_when_the_process_that_started_it_is_killed(state: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    program = tmp_path_factory.mktemp("employer") / "employer.py"
    program.write_text(EMPLOYER)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    employer = subprocess.Popen([sys.executable, program, state], stdout=subprocess.PIPE, text=True, env=environment)
    assert employer.stdout is not None
    worker = int(employer.stdout.readline())
    try:
        assert running(worker)
        employer.send_signal(signal.SIGKILL)
        employer.wait()
        until = time.monotonic() + 60
        while running(worker) and time.monotonic() < until:
            time.sleep(0.05)
        assert not running(worker)
    finally:
        employer.stdout.close()
        if running(worker):
            os.kill(worker, signal.SIGKILL)


def test_a_worker_has_one_thread_of_torch() -> None:
    with worker_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
