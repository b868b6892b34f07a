"""Where a trajectory store keeps what, and how files get there: aside first, then renamed, so that none is ever half there.

    <root>/data/metadata.json            Minari's keys, and ours under "mango"; written last
    <root>/data/main_data.hdf5           episode_0, episode_1, ...: links into the shards
    <root>/data/shards/<writer>-<n>.h5   immutable; `.h5.tmp` while it is written, `<writer>.lock` beside it
    <root>/quarantine/                   what could not be read; nothing is deleted
    <root>/cache/<digest>/               flat arrays for training, see mango_env.cache
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mango.config import KNOBS, KNOBS_VERSION, LADDER, Ladder
from mango.features import FEATURES, SCHEMA_HASH
from mango_env.reward import Reward

FORMAT = "mango-trajectories"
FORMAT_VERSION = 1
INDEX_FILE, METADATA_FILE, SHARDS = "main_data.hdf5", "metadata.json", "shards"
MINARI_VERSION = "0.5.4"                                     # whose layout this is
MINARI_ID = re.compile(r"mango/[-\w]+/[-\w]+-v\d+")


@dataclass(frozen=True)
class Header:
    """What all episodes of one store share, and what a reader must agree with. It stands in every file.

    `task` and `policy` name the dataset (what was trained, who decided); `reward` is what the rewards were made with.
    """

    task: str
    policy: str
    reward: Reward
    ladder: Ladder = LADDER
    knobs_version: int = KNOBS_VERSION
    schema_hash: str = SCHEMA_HASH
    feature_names: tuple[str, ...] = field(default=tuple(f.name for f in FEATURES), repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "policy": self.policy,
            "reward": json.loads(self.reward.to_json()),
            "ladder": json.loads(self.ladder.to_json()),
            "knobs_version": self.knobs_version,
            "knobs": {knob: list(menu) for knob, menu in KNOBS.items()},
            "schema_hash": self.schema_hash,
            "feature_names": list(self.feature_names),
        }

    @classmethod
    def from_dict(cls, found: Any, where: str | Path) -> "Header":
        """Read a header and refuse what this version cannot read. `where` is named in the error.

        Raises ValueError saying what was expected and what was found.
        """
        expected = {"format": FORMAT, "format_version": FORMAT_VERSION}
        expected |= {"schema_hash": SCHEMA_HASH, "knobs_version": KNOBS_VERSION}
        for key, value in expected.items():
            given = found.get(key) if isinstance(found, Mapping) else None
            if given != value:
                raise ValueError(f"{where}: expected {key} {value!r}, found {given!r}; {_advice(key)}")
        try:
            ladder, reward = Ladder.from_json(json.dumps(found["ladder"])), Reward.from_json(found["reward"])
            return cls(str(found["task"]), str(found["policy"]), reward, ladder)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: the header is incomplete or malformed ({error!r})") from error

    def must_match(self, other: "Header", where: str | Path, same_reward: bool = True) -> None:
        """Refuse to mix two kinds of episodes in one store."""
        for key in ("ladder", "reward")[: 1 + same_reward]:
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                raise ValueError(f"{where} has {key} {theirs!r}, not {mine!r}; keep them in different folders")


def _advice(key: str) -> str:
    if key in ("schema_hash", "knobs_version"):
        return "it was recorded by a version of mango with other features or menus: record again, or use that version"
    return "it is no trajectory store of this version"


@dataclass(frozen=True)
class Paths:
    """The files of the store at `root`, which may be given as the root or as its `data` folder."""

    root: Path

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "Paths":
        folder = Path(path)
        inside = folder.name == "data" and (folder / METADATA_FILE).exists()
        return cls(folder.parent if inside else folder)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def shards(self) -> Path:
        return self.data / SHARDS

    @property
    def index(self) -> Path:
        return self.data / INDEX_FILE

    @property
    def metadata(self) -> Path:
        return self.data / METADATA_FILE

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def create(self) -> None:
        """Make the folders; OSError in one line where that is impossible."""
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot make a trajectory store at {self.root}"
            raise explained(error, what, "choose a folder that can be written") from error

    def must_be_recordable(self) -> None:
        """Refuse to rebuild the index of a packed store, whose index holds the episodes themselves."""
        if self.index.exists() and not self.shards.is_dir():
            raise ValueError(f"{self.root} is packed and cannot be added to; record into another folder and merge the two")

    def dataset_id(self, header: Header) -> str:
        """Minari's name of the store: its path where that is one (`mango/<task>/<policy>-v<n>`), else made from the header."""
        tail = "/".join(self.root.absolute().parts[-3:])
        return tail if MINARI_ID.fullmatch(tail) else dataset_id(header.task, header.policy)

    @property
    def index_lock(self) -> Path:
        """The lock file under which one process at a time rebuilds index and metadata."""
        return self.shards / ".index.lock"


def dataset_id(task: str, policy: str) -> str:
    return f"mango/{slug(task)}/{slug(policy)}-v0"


def slug(name: str) -> str:
    """`name` with only letters, digits, `_` and `-`, for file names and Minari's ids."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "unnamed"


def minari_root(task: str, policy: str) -> Path:
    """Where `minari.load_dataset("mango/<task>/<policy>-v0")` looks: below $MINARI_DATASETS_PATH or ~/.minari/datasets."""
    return minari_folder() / dataset_id(task, policy)


def minari_folder() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def explained(error: OSError, what: str, advice: str) -> OSError:
    """The same kind of OSError with one line that says what failed, why, and what to do."""
    number = error.errno if error.errno is not None else 5
    return OSError(number, f"{what}: {error.strerror or error}; {advice}")


def aside(path: Path) -> Path:
    """Where to write before renaming to `path`; unique per process."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Rename a written file to its name, surviving a power cut: the file first, then the folder's entry."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def as_json(payload: Mapping[str, Any]) -> str:
    return json.dumps(payload, indent=1) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a whole file; OSError, and no file, where that is impossible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        path.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} holds no {path.name}; a trajectory store has data/{METADATA_FILE}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable JSON ({error}); rebuild it with `mango data salvage`") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found
