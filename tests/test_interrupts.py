"""Ctrl-C at any moment: no half-written file, nothing lost that was acknowledged, and never without effect."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mango import MANGO
from mango_env.dataset import TrajectoryDataset, recorded_layers
from mango_env.interrupts import interrupted_once, interrupts_held
from mango_env.recorder import TrajectoryRecorder
from mango_env.store import TrajectoryWriter
from mango_env.validate import validate
from tests.made_episodes import PROCESSES, finish, make_episode, record_until_interrupted, same, start, writer

ROUNDS = 30


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_the_block_however_often_it_comes() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        with interrupts_held():
            ctrl_c()
            done.append("inner")
            ctrl_c()
        ctrl_c()
        done.append("outer")
    assert done == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is before
    with interrupts_held():
        pass                                                 # it comes once


def test_an_error_in_the_block_does_not_swallow_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, interrupts_held():  # noqa: PT012
        ctrl_c()
        raise OSError("full")
    assert isinstance(stopped.value.__context__, OSError)


def test_ctrl_c_that_is_ignored_stays_ignored_and_other_threads_are_let_through() -> None:
    before, done = signal.signal(signal.SIGINT, signal.SIG_IGN), []
    try:
        with interrupts_held():
            ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)

    @interrupts_held()
    def work() -> None:
        done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


def test_a_worker_is_interrupted_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupted_once():  # noqa: PT012
        try:
            ctrl_c()
        finally:
            ctrl_c()                                         # while it puts things away
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_random_moments_of_recording_leaves_whole_shards_with_every_episode(tmp_path: Path) -> None:
    """A real process and real signals, one per round."""
    rng = np.random.default_rng(0)
    ours, theirs = PROCESSES.Pipe()
    process = start(record_until_interrupted, theirs, tmp_path)
    theirs.close()
    for i in range(ROUNDS):
        ours.send(i)
        assert ours.poll(60) and ours.recv() == "recording"
        time.sleep(float(rng.uniform(0, 0.04)))
        os.kill(process.pid, signal.SIGINT)
        assert ours.poll(10), f"round {i}: Ctrl-C was lost"
        added, root = ours.recv(), tmp_path / str(i)
        episodes = list(TrajectoryDataset(root).episodes(check=True))
        assert added <= len(episodes) <= added + 1, "the last one was kept, but add did not return any more"
        assert all(same(episode, make_episode(i, layer)) for layer, episode in enumerate(episodes))
        assert validate(root).ok and not list(root.rglob("*.tmp")) and not list(root.rglob("[!.]*.lock"))
    ours.send(None)
    assert finish(process) == 0


def test_a_recorder_interrupted_while_it_writes_keeps_each_layer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrajectoryWriter.add

    def interrupted(self: Any, episode: Any) -> None:
        ctrl_c()
        original(self, episode)

    monkeypatch.setattr(TrajectoryWriter, "add", interrupted)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    optimizer = MANGO(model.named_parameters(), policy="random", memory_budget=0.6, policy_update_freq=2)
    with pytest.raises(KeyboardInterrupt), TrajectoryRecorder(optimizer, tmp_path, run_id="r", episode_decisions=2):  # noqa: PT012
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 64)).square().mean()
            loss.backward()
            optimizer.observe_loss(loss)
            optimizer.step()
    layers = set(range(len(optimizer.layers)))
    assert recorded_layers(tmp_path) == {"r.0": (layers, len(layers))} and len(TrajectoryDataset(tmp_path)) == len(layers)


def test_a_shard_whose_episode_was_interrupted_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C from within the file that HDF5 writes to, at its every write."""
    from mango_env.stopping_file import StoppingFile

    original = StoppingFile.write

    def interrupting(self: Any, buffer: memoryview) -> int:
        ctrl_c()
        return original(self, buffer)

    monkeypatch.setattr(StoppingFile, "write", interrupting)
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path)                                     # its index is written
    w = writer(tmp_path)
    for layer in range(3):
        with pytest.raises(KeyboardInterrupt):
            w.add(make_episode(layer=layer))
    with pytest.raises(KeyboardInterrupt):
        w.close()
    monkeypatch.undo()
    assert [same(e, make_episode(layer=j)) for j, e in enumerate(TrajectoryDataset(tmp_path).episodes(check=True))] == [True] * 3
    assert validate(tmp_path).ok and not list(tmp_path.rglob("*.tmp"))
