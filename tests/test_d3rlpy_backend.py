"""d3rlpy trains our trunk: really, repeatably, and without leaving anything behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mango.config import LADDER
from mango.networks import PolicyNetwork
from mango_env.adapters import to_d3rlpy
from mango_env.cache import TrajectoryCache
from tests.mixed_data import answer
from train_policy import d3rlpy_backend
from train_policy.fitting import TrainingInterrupted
from train_policy.offline import OfflineArgs, train
from train_policy.transfer import greedy

ALL = ["d3rlpy-discrete-cql", "d3rlpy-iql", "d3rlpy-td3+bc"]


@pytest.mark.parametrize("algo", ALL)
def test_a_backend_trains_repeatably_and_leaves_nothing(
    algo: str, riddle: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 (it is their state that must stay)
    start, args = PolicyNetwork(hidden=(16,)), OfflineArgs(algo=algo, updates=20, report_every=10, batch_size=32)
    first, second = train(start, riddle, args), train(start, riddle, args)
    for a, b in zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    trunks = zip(first.network.trunk.parameters(), start.trunk.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in trunks)
    assert [row["updates"] for row in first.curves] == [10, 20]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert torch.equal(before[0], torch.get_rng_state())
    assert str(before[1]) == str(np.random.get_state())  # noqa: NPY002


def test_discrete_cql_finds_what_pays_in_random_data(riddle: TrajectoryCache) -> None:
    args = OfflineArgs(algo="d3rlpy-discrete-cql", updates=400, learning_rate=3e-3, gamma=0.0, batch_size=128)
    result = train(PolicyNetwork(hidden=(32,)), riddle, args)
    seen = np.concatenate([episode["observations"][:-1] for episode in riddle.episodes()])
    assert (greedy(result.network, torch.from_numpy(seen))[:, 0].numpy() == answer(seen)).mean() > 0.7


@pytest.mark.parametrize("algo", ["discrete-cql", "iql"])
def test_the_action_size_is_the_menus_whatever_the_data_hold(algo: str, riddle: TrajectoryCache) -> None:
    """d3rlpy infers it from the data, where the largest rung may be missing."""
    few = riddle.select(np.array([0]))
    built = d3rlpy_backend.build(algo, PolicyNetwork(hidden=(8,)), batch_size=4, learning_rate=1e-3, gamma=0.9)
    view = to_d3rlpy(few, "rung" if algo == "discrete-cql" else "continuous")
    assert built.impl.action_size == view.dataset_info.action_size == (len(LADDER) if algo == "discrete-cql" else 7)


def test_ctrl_c_brings_back_what_was_learned(riddle: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = d3rlpy_backend.bring_back, 0

    def interrupted(*given: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        original(*given, **options)  # type: ignore[arg-type]
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(d3rlpy_backend, "bring_back", interrupted)
    args = OfflineArgs(algo="d3rlpy-discrete-cql", updates=60, report_every=10, batch_size=32)
    with pytest.raises(TrainingInterrupted, match="interrupted after 10 updates"):
        train(PolicyNetwork(hidden=(8,)), riddle, args, checkpoint=tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").is_file()


def test_importing_the_backend_loads_no_d3rlpy_and_using_it_is_quiet() -> None:
    code = (
        "import sys, json, train_policy.offline, train_policy.d3rlpy_backend as b; "
        "early = 'd3rlpy' in sys.modules; b.register(); print(json.dumps([early, 'd3rlpy' in sys.modules]))"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(run.stdout) == [False, True] and run.stderr == ""
