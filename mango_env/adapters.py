"""Trajectories for other libraries: d3rlpy, Minari, NumPy. Own code, because the ready-made bridges shift data.

`d3rlpy.datasets.get_minari` pairs T + 1 observations with T actions, so that every episode after the first is off by
one step more, and d3rlpy drops the last transition, reward included, of episodes that are not terminated. The tests
follow tagged observations through every way out.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mango.config import KNOBS, NVEC
from mango.features import FEATURE_DIM
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.curate import compact
from mango_env.dataset import TrajectoryDataset
from mango_env.episode import FLAGS, INFOS, Array, Episode
from mango_env.layout import MINARI_ID, Header, aside, explained, minari_folder, publish
from mango_env.reward import Reward
from mango_env.store import TrajectoryWriter

Source = str | os.PathLike[str] | TrajectoryDataset | TrajectoryCache
ACTION_VIEWS = ("rung", "continuous")
_TOP = np.array(NVEC, np.float32) - 1                        # (7,) largest index of every knob


def quiet_gym() -> None:
    """Silence the dead `gym`, which d3rlpy and SB3 import and which prints a notice to stderr. Call it before them."""
    if importlib.util.find_spec("gym_notices") is not None:
        importlib.import_module("gym_notices.notices").notices.clear()


def import_d3rlpy() -> Any:
    """d3rlpy, without that notice; ImportError saying how to install it."""
    return _import("d3rlpy")


def _import(name: str) -> Any:
    quiet_gym()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{name} cannot be imported ({error}): pip install "mango-optim[train]"') from error


def to_d3rlpy(source: Source, actions: str = "rung") -> Any:
    """A `d3rlpy.dataset.ReplayBuffer` of all episodes, aligned, with every reward.

    `actions="rung"`: one discrete action, the ladder's rung (for DiscreteBC, DiscreteCQL, DiscreteSAC, ...).
    `actions="continuous"`: (7,) floats in [-1, 1], see `to_continuous` (for BC, CQL, IQL, TD3+BC, AWAC, ...).
    The buffer's `dataset_info` has the true `action_size`, whatever the data happen to contain.

    A path or a cache is read through memory maps, so observations may exceed memory; d3rlpy itself keeps about
    150 bytes per transition. An episode that came to its end is `terminated`. One that was stopped from outside gets a
    last step of reward 0 after its final observation: d3rlpy drops the last step of such episodes, now that one.
    """
    if actions not in ACTION_VIEWS:
        raise ValueError(f"actions={actions!r} is not one of {ACTION_VIEWS}")
    d3rlpy = import_d3rlpy()
    episodes, ladder = _views(source)
    discrete = actions == "rung"
    signature = d3rlpy.dataset.Signature
    floats, taken = np.dtype(np.float32), (np.dtype(np.int32), 1) if discrete else (np.dtype(np.float32), len(KNOBS))
    return d3rlpy.dataset.ReplayBuffer(
        d3rlpy.dataset.InfiniteBuffer(),
        episodes=[_d3rlpy_episode(d3rlpy, episode, discrete) for episode in episodes],
        observation_signature=signature(dtype=[floats], shape=[(FEATURE_DIM,)]),
        action_signature=signature(dtype=[taken[0]], shape=[(taken[1],)]),
        reward_signature=signature(dtype=[floats], shape=[(1,)]),
        action_space=d3rlpy.ActionSpace.DISCRETE if discrete else d3rlpy.ActionSpace.CONTINUOUS,
        action_size=len(ladder) if discrete else len(KNOBS),
    )


def _d3rlpy_episode(d3rlpy: Any, episode: dict[str, Array], discrete: bool) -> Any:
    taken = episode["rung"][:, None].astype(np.int32) if discrete else to_continuous(episode["actions"])
    rewards = episode["rewards"][:, None]
    if episode["terminations"][-1]:
        return d3rlpy.dataset.Episode(episode["observations"][:-1], taken, rewards, terminated=True)
    taken, rewards = np.concatenate([taken, taken[-1:]]), np.concatenate([rewards, np.zeros((1, 1), np.float32)])
    return d3rlpy.dataset.Episode(episode["observations"], taken, rewards, terminated=False)


def to_continuous(actions: Array) -> NDArray[np.float32]:
    """Knob indices (..., 7) as floats in [-1, 1]: the first of a menu is -1, the last 1, equal steps between.

    >>> to_continuous(np.zeros(7, np.int8)).tolist()
    [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    """
    return np.asarray(actions, np.float32) / _TOP * 2 - 1


def from_continuous(values: Array) -> NDArray[np.int8]:
    """The knob indices (..., 7) nearest to floats (..., 7); what lies outside [-1, 1] takes the nearest end.

    >>> from_continuous(to_continuous(np.array([0, 1, 2, 3, 4, 1, 2]))).tolist()
    [0, 1, 2, 3, 4, 1, 2]
    """
    return np.rint((np.clip(values, -1, 1) + 1) / 2 * _TOP).astype(np.int8)


def to_npz(source: Source, path: str | os.PathLike[str]) -> Path:
    """All episodes as one compressed .npz that `numpy.load` reads without pickle. Returns its path.

    Per-step arrays are (N, ...) over all episodes; `observations` are (N + E, 64), T + 1 rows per episode; `lengths`
    (E,) has every episode's T; `attributes` is JSON, a list of facts per episode; `ladder` is JSON.
    """
    episodes, ladder = _views(source)
    kept = list(episodes)
    if not kept:
        raise ValueError("there are no episodes to write")
    arrays = {name: np.concatenate([episode[name] for episode in kept]) for name in kept[0]}
    lengths = np.array([len(episode["rewards"]) for episode in kept], np.int64)
    texts = {"attributes": json.dumps(_facts(source)), "ladder": ladder.to_json()}
    content: dict[str, Any] = {"lengths": lengths, **arrays, **{name: np.array(text) for name, text in texts.items()}}
    target = Path(path)
    temporary = aside(target)
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **content)
        publish(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explained(error, f"cannot write {target}", "make room or choose another folder") from error
    return target


def _views(source: Source) -> tuple[Iterator[dict[str, Array]], Any]:
    """Arrays of every episode, and the ladder that their rungs mean."""
    if isinstance(source, TrajectoryDataset):
        return map(_columns, source), source.header.ladder
    cache = source if isinstance(source, TrajectoryCache) else build_cache(source)
    return cache.episodes(), cache.header.ladder


def _columns(episode: Episode) -> dict[str, Array]:
    own = {name: getattr(episode, name) for name in ("observations", "actions", "rewards", *FLAGS)}
    return own | {name: episode.infos[name] for name in INFOS}


def _facts(source: Source) -> list[dict[str, Any]]:
    if isinstance(source, TrajectoryDataset):
        return source.attributes
    table = (source if isinstance(source, TrajectoryCache) else build_cache(source)).attributes
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def to_minari(path: str | os.PathLike[str], dataset_id: str | None = None) -> Any:
    """The store as a `minari.MinariDataset`, registered so that `minari.load_dataset(dataset_id)` finds it.

    A store that lies where Minari looks (`mango_env.layout.minari_root`) is loaded as it is; any other, and a file made
    by `compact`, is copied there as one file. `dataset_id` is by default the store's own, `mango/<task>/<policy>-v0`.

    Raises ValueError where that name is taken by other data.
    """
    minari = _import("minari")
    dataset = TrajectoryDataset(path)
    name = dataset_id or dataset.id
    if not MINARI_ID.fullmatch(name):
        raise ValueError(f"dataset_id={name!r} must read mango/<task>/<policy>-v<number>")
    target = minari_folder() / name
    if target.exists():
        found = TrajectoryDataset(target)
        if found.digest != dataset.digest:
            clash = f"digest {found.digest}, not {dataset.digest}"
            raise ValueError(f"{target} holds other data ({clash}); choose another dataset_id")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        compact(path, target)
    return minari.load_dataset(name)


def from_minari(dataset: Any, out: str | os.PathLike[str], *, reward: Reward | None = None) -> Path:
    """A store at `out` from a Minari dataset of the same episodes: a name, or a `MinariDataset` (a filtered one, too).

    `reward`: what its rewards were made with, where its metadata do not say. Returns the root.

    Raises ValueError where the schema differs, or an episode lacks what the standard asks for.
    """
    minari = _import("minari")
    source = minari.load_dataset(dataset) if isinstance(dataset, str) else dataset
    ours = source.storage.metadata.get("mango")
    if ours is None and reward is None:
        raise ValueError(f"{source.id} has no 'mango' in its metadata; say reward=Reward(...), what its rewards were made with")
    task, policy = source.id.rsplit("-v", 1)[0].split("/")[-2:] if "/" in source.id else ("imported", source.id)
    header = Header(task, policy, reward or Reward()) if ours is None else Header.from_dict(ours, source.id)
    writer = TrajectoryWriter(out, task=header.task, policy=header.policy, reward=header.reward, ladder=header.ladder)
    with writer:
        for data, facts in zip(source, source.storage.get_episode_metadata(source.episode_indices), strict=True):
            writer.add(_from_minari_episode(data, facts, header))
    return writer.paths.root


def _from_minari_episode(data: Any, facts: dict[str, Any], header: Header) -> Episode:
    known = {name: value for name, value in facts.items() if name not in ("total_steps", "complete", "digest", "id", "options")}
    return Episode(
        observations=data.observations,
        actions=data.actions,
        rewards=data.rewards,
        terminations=data.terminations,
        truncations=data.truncations,
        infos=data.infos or {},
        attributes={"reward": header.reward.to_json(), **known},
    )
