"""Bring the episodes of killed writers back into the store, and set aside what cannot be read.

A killed process, or a disk that ran full, leaves `<shard>.h5.tmp`. Every episode in it that is whole (its hash agrees)
goes into a published shard; only the one that was being written is lost. Running it again changes nothing.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mango_env.episode import Episode
from mango_env.layout import Header, Paths, explained, read_json, sync
from mango_env.locks import locked, try_lock
from mango_env.shards import PART, SUFFIX, ShardWriter, open_shard, read_entries, read_episode, read_header
from mango_env.store import finalize, write_index

SALVAGED = f"-salvaged{SUFFIX}"
ELSEWHERE_SECONDS = 24 * 3600.0         # a shard of another machine that nobody wrote to for this long has no writer


@dataclass(frozen=True)
class Salvage:
    """What `salvage` did. File names are relative to the root of the store."""

    episodes: int                       # recovered
    recovered: tuple[str, ...]          # shards that hold them now
    quarantined: tuple[str, ...]        # moved away: unreadable, or only partly readable (then the rest was recovered)
    alive: tuple[str, ...]              # left alone: their writers are still at work, or on another machine


def salvage(root: str | os.PathLike[str], *, elsewhere: bool = False, writer: str = "") -> Salvage:
    """Recover complete episodes of dead writers, quarantine unreadable files, rebuild the index.

    A writer on this machine holds a lock for as long as it lives. Whether one on another machine (a shared folder) lives
    cannot be known for sure: its shard is left alone until nobody wrote to it for a day, or until `elsewhere=True` says
    that no other machine is recording. `writer`: the files of that writer alone (`TrajectoryWriter.name`), which is known
    to be gone, wherever it was.

    Raises ValueError where `root` is no trajectory store of this version, OSError where the recovered cannot be written.
    """
    paths = Paths.of(root)
    paths.must_be_recordable()
    header, elsewhere = _header(paths), elsewhere or bool(writer)
    episodes, recovered, quarantined, alive = 0, [], [], []
    with locked(paths.shards / ".salvage.lock"):
        for stale in paths.shards.glob(f"{writer}*{SALVAGED}.tmp"):
            stale.unlink(missing_ok=True)                    # of a salvage that was killed: what it copied is still there
        for file in sorted((*paths.shards.glob(f"{writer}*{SUFFIX}.tmp"), *paths.shards.glob(f"{writer}*{SUFFIX}"))):
            if file.name.endswith(".tmp") and not _is_dead(file, elsewhere):
                alive.append(_relative(paths, file))
                continue
            if file.name.endswith(SUFFIX) and _is_sound(file, header):
                continue
            if _is_sound(file.with_name(file.name.removesuffix(".tmp")), header):
                file.unlink(missing_ok=True)                 # killed between publishing and removing it, or published just now
                continue
            found, whole = _episodes(file, header)
            target = file.with_name(file.name.removesuffix(".tmp").removesuffix(SUFFIX) + SALVAGED)
            if found and not target.exists():                # it exists where a salvage was killed just before the next lines
                _write(target, header, found)
                episodes += len(found)
                recovered.append(_relative(paths, target))
            if whole:
                file.unlink()
            else:
                quarantined.append(_quarantine(paths, file))
        _sweep(paths, elsewhere, writer)
    finalize(paths.root)
    return Salvage(episodes, tuple(recovered), tuple(quarantined), tuple(alive))


def _header(paths: Paths) -> Header:
    """The store's header; where metadata.json is damaged or lost, from the first readable shard."""
    try:
        return Header.from_dict(read_json(paths.metadata).get("mango"), paths.metadata)
    except ValueError:
        for file in sorted(paths.shards.glob(f"*{SUFFIX}*")):
            try:
                with open_shard(file) as shard:
                    header = read_header(shard, file)
            except ValueError:
                continue
            if paths.metadata.exists():
                _quarantine(paths, paths.metadata)
            with locked(paths.index_lock):
                write_index(paths, header, [])
            return header
        raise


def _is_dead(file: Path, elsewhere: bool) -> bool:
    """Whether nobody writes to a shard any more. `<writer>-<n>.h5.tmp` belongs to `<writer>.lock`."""
    lock = file.with_name(file.name.rsplit("-", 1)[0] + ".lock")
    try:
        text = lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True                                          # its writer let go of it: the disk was full
    if not try_lock(lock):
        return False
    try:
        writer: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        writer = {}                                          # killed while writing the lock: its lock is gone, as it should
    if writer.get("host", socket.gethostname()) != socket.gethostname():
        last_sign = (file if file.exists() else lock).stat().st_mtime
        return elsewhere or time.time() - last_sign > ELSEWHERE_SECONDS
    return bool(writer.get("locked", True)) or not _runs(int(writer["pid"]))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_sound(file: Path, header: Header) -> bool:
    """Whether a published shard can be opened, belongs here and has an entry for every group."""
    try:
        found, _ = read_entries(file)
        header.must_match(found, file)
    except ValueError:
        return False
    return True


def _episodes(file: Path, header: Header) -> tuple[list[Episode], bool]:
    """The whole episodes of a file, and whether nothing else in it claims to be one."""
    found: list[Episode] = []
    whole = True
    try:
        with open_shard(file) as shard:
            header.must_match(read_header(shard, file), file)
            for name in shard:
                try:
                    group = shard[name]
                    claims = bool(group.attrs.get("complete", 0)) or file.name.endswith(SUFFIX)
                except (KeyError, OSError, RuntimeError):
                    claims, whole = False, False
                if claims:
                    try:
                        found.append(read_episode(group, f"{file}:{name}", check=True))
                    except ValueError:
                        whole = False
    except (ValueError, OSError, RuntimeError):              # HDF5 reports damaged structures as either
        return found, False
    return found, whole


def _write(target: Path, header: Header, episodes: list[Episode]) -> None:
    try:
        shard = ShardWriter(target, header, len(episodes))
        try:
            for episode in episodes:
                shard.add(episode)
            shard.publish()
        except BaseException:
            shard.abandon()
            raise
    except BaseException as error:
        target.with_name(target.name + ".tmp").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained(error, f"cannot write {target}", "make room and run it again; nothing was lost") from error
        raise


def _quarantine(paths: Paths, file: Path) -> str:
    """Move a file to quarantine/ under a name that is free. Returns the new name relative to the root."""
    paths.quarantine.mkdir(exist_ok=True)
    target, copies = paths.quarantine / file.name, 0
    while target.exists():
        copies += 1
        target = paths.quarantine / f"{file.name}.{copies}"
    file.rename(target)
    sync(file.parent)
    return _relative(paths, target)


def _sweep(paths: Paths, elsewhere: bool, writer: str) -> None:
    """Remove what dead writers left beside their shards, and half-written indexes."""
    for part in paths.shards.glob(f"{writer}*{PART}"):
        if _is_dead(part, elsewhere):
            part.unlink(missing_ok=True)                     # its original is a .tmp, or it was published
    for lock in paths.shards.glob(f"{writer}*.lock"):
        if not lock.name.startswith(".") and _is_dead(lock.with_name(f"{lock.stem}-0000{SUFFIX}.tmp"), elsewhere):
            lock.unlink(missing_ok=True)
    with locked(paths.index_lock):
        for file in (*paths.data.glob(f"{paths.index.name}.*.tmp"), *paths.data.glob(f"{paths.metadata.name}.*.tmp")):
            file.unlink()


def _relative(paths: Paths, file: Path) -> str:
    return str(file.relative_to(paths.root))
