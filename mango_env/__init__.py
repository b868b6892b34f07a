"""Training runs under compression as Gymnasium episodes, and the store of their trajectories.

Importing this package registers `Mango/TrainingRun-v0` and loads nothing else: names are resolved when they are used.

>>> import gymnasium as gym, mango_env
>>> env = gym.make("Mango/TrainingRun-v0", workload="digits_mlp", horizon=20, interval=10, memory_budget=0.25)
"""

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from mango_env.dataset import TrajectoryDataset as TrajectoryDataset
    from mango_env.env import MangoEnv as MangoEnv
    from mango_env.episode import Episode as Episode
    from mango_env.layer_vec_env import LayerVecEnv as LayerVecEnv
    from mango_env.recorder import GradientProfiler as GradientProfiler
    from mango_env.recorder import TrajectoryRecorder as TrajectoryRecorder
    from mango_env.recorder import record_run as record_run
    from mango_env.reward import Reward as Reward
    from mango_env.run import Interval as Interval
    from mango_env.run import TrainingRun as TrainingRun
    from mango_env.store import TrajectoryWriter as TrajectoryWriter
    from mango_env.twin import twin_of as twin_of
    from mango_env.workloads import WORKLOADS as WORKLOADS
    from mango_env.workloads import Workload as Workload
    from mango_env.workloads import make_workload as make_workload

_HOME = {
    "MangoEnv": "mango_env.env",
    "Episode": "mango_env.episode",
    "LayerVecEnv": "mango_env.layer_vec_env",
    "GradientProfiler": "mango_env.recorder",
    "TrajectoryRecorder": "mango_env.recorder",
    "record_run": "mango_env.recorder",
    "Reward": "mango_env.reward",
    "Interval": "mango_env.run",
    "TrainingRun": "mango_env.run",
    "TrajectoryDataset": "mango_env.dataset",
    "TrajectoryWriter": "mango_env.store",
    "twin_of": "mango_env.twin",
    "WORKLOADS": "mango_env.workloads",
    "Workload": "mango_env.workloads",
    "make_workload": "mango_env.workloads",
}
__all__ = sorted(_HOME)

ENV_ID = "Mango/TrainingRun-v0"
if ENV_ID not in gymnasium.registry:
    # A string: a callable entry point would make `EnvSpec.to_json`, and so Minari, fail.
    gymnasium.register(id=ENV_ID, entry_point="mango_env.env:MangoEnv")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mango_env' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
