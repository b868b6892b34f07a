"""State in host memory: what exceeds the memory budget lies in pinned memory or in a mapped file, up to a budget of its own.

On the CPU the kernels work on the mapped file itself, and the system keeps in memory what it has room for. A CUDA device
works on copies of two layers at most: the one at hand and the next, which comes on a stream of its own meanwhile (bnb's
paged optimizers leave that to page faults: Dettmers et al. 2023, sec. 3).
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mango.codecs import Encoded
from mango.state import TensorState

NEAR = 2                                                     # paged layers that a device has copies of at a time


class Store(Protocol):
    """Where paged tensors are made."""

    def empty_like(self, x: Tensor) -> Tensor: ...


class FileStore:
    """Tensors in mapped files of a folder. A file has no name any more once it is mapped: nothing is left behind, however
    the process ends.

    Raises:
        ValueError: no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise ValueError(f"page_to={str(folder)!r} is no folder; make it, or name another one")

    def empty_like(self, x: Tensor) -> Tensor:
        """An uninitialised tensor of the same shape and dtype. OSError where the disk has no room for it."""
        size = x.numel() * x.element_size()
        if not size:
            return torch.empty_like(x, device="cpu")
        try:
            file, name = tempfile.mkstemp(dir=self.folder, prefix="mango-")
            try:
                _reserve(file, size)                         # a hole in a file would kill the process when it is written to
                storage = torch.UntypedStorage.from_file(name, True, size)
            finally:
                os.close(file)
                os.unlink(name)
        except OSError as error:
            why = f"page_to: {size:,} bytes of state find no room in {self.folder} ({error.strerror})"
            raise OSError(error.errno, why) from error
        flat: Tensor = torch.empty(0, dtype=x.dtype).set_(storage)  # type: ignore[arg-type]
        return flat.view(x.shape)


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, 1 << 20):
        os.write(file, bytes(min(1 << 20, size - start)))


class PinnedStore:
    """Tensors in page-locked memory, which a CUDA device copies from and to without waiting."""

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)


class Paged(dict[str, Encoded]):
    """The slots of one tensor's state; what is put in is moved to a store and worked on there."""

    def __init__(self, store: Store, slots: Mapping[str, Encoded]) -> None:
        super().__init__()
        self.store = store
        self._places: dict[str, dict[str, Tensor]] = {}      # of every slot, kept while it is emptied and filled again
        for slot, encoded in slots.items():
            self[slot] = encoded

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.store, dict(self))

    def __setitem__(self, slot: str, encoded: Encoded) -> None:
        places, parts = self._places.get(slot, {}), encoded.parts
        if [(n, p.dtype, p.shape) for n, p in places.items()] != [(n, p.dtype, p.shape) for n, p in parts.items()]:
            places.clear()                                   # the old bytes go before the new ones come
            self._places.pop(slot, None)
            super().pop(slot, None)
            places = {name: self.store.empty_like(part) for name, part in parts.items()}
            self._places[slot] = places
        for name, part in parts.items():
            places[name].copy_(part, non_blocking=True)
        super().__setitem__(slot, Encoded(encoded.codec, encoded.shape, dict(places)))

    def tidy(self) -> None:
        """Give back the places of slots that are empty."""
        self._places = {slot: places for slot, places in self._places.items() if slot in self}


class Staged(Paged):
    """Paged slots of a CUDA tensor: looked up, they are copies on the device; `settle` writes back what changed in place."""

    def __init__(self, store: Store, slots: Mapping[str, Encoded], pager: "Pager") -> None:
        self._pager, self._device = pager, pager.device
        self._near: dict[str, Encoded] = {}
        self._seen: set[str] = set()                         # looked up: may have been changed in place
        self._come: Any = None                               # event: copies from the host are complete
        self._gone: Any = None                               # event: copies to the host are
        super().__init__(store, slots)

    def __reduce__(self) -> tuple[Any, ...]:
        self.settle()
        return type(self), (self.store, dict(self.items()), self._pager)

    def _fetch(self, slot: str) -> Encoded:
        far = super().__getitem__(slot)
        return far.to(self._device)

    def _use(self) -> None:
        """Come first in the pager's order; on a GPU, have this stream wait for the copies that are under way."""
        self._pager.use(self)
        if self._device.type != "cuda":
            return
        now = torch.cuda.current_stream(self._device)
        for event in (self._come, self._gone):
            if event is not None:
                now.wait_event(event)
        for part in (part for near in self._near.values() for part in near.parts.values()):
            part.record_stream(now)                          # made on the pager's stream, used on this one

    def __getitem__(self, slot: str) -> Encoded:
        self._use()
        self._seen.add(slot)
        if slot not in self._near:
            self._near[slot] = self._fetch(slot)
        return self._near[slot]

    def get(self, slot: str, default: Any = None) -> Any:
        return self[slot] if slot in self else default       # noqa: SIM401 - dict's own would give what the host has

    def pop(self, slot: str, *default: Any) -> Any:
        if slot not in self:
            return super().pop(slot, *default)
        near = self[slot]
        del self[slot]
        return near

    def __setitem__(self, slot: str, encoded: Encoded) -> None:
        self._use()
        super().__setitem__(slot, encoded)
        self._near[slot] = encoded

    def __delitem__(self, slot: str) -> None:
        super().__delitem__(slot)
        self._near.pop(slot, None)

    def prefetch(self, stream: Any) -> None:
        """Copy all that is not here yet to the device, on a stream of its own where there is one."""
        self._pager.use(self)
        missing = [slot for slot in self if slot not in self._near and slot != "held"]
        if stream is None:
            self._near |= {slot: self._fetch(slot) for slot in missing}
            return
        with torch.cuda.stream(stream):
            if self._gone is not None:
                stream.wait_event(self._gone)
            self._near |= {slot: self._fetch(slot) for slot in missing}
            self._come = stream.record_event()

    def settle(self) -> None:
        """Write back what may have changed in place (float32 alone does) and drop the copies."""
        for slot, near in self._near.items():
            if near.codec == "float32" and slot in self._seen:
                super().__setitem__(slot, near)
        if self._near and self._device.type == "cuda":
            self._gone = torch.cuda.current_stream(self._device).record_event()
        self._near, self._seen, self._come = {}, set(), None

    @property
    def near_bytes(self) -> int:
        return sum(near.nbytes for near in self._near.values())


class Pager:
    """Which layers of an optimizer are paged, and where to. Without a place it pages nothing."""

    def __init__(self, place: str | Path | None, device: torch.device) -> None:
        self.device = device
        self.layers: frozenset[int] = frozenset()
        self._active: list[Staged] = []                      # have copies on the device, the latest used last
        self._stream: Any = None
        if place == "pinned" and device.type != "cuda":
            raise ValueError(f'page_to="pinned" is for parameters on a CUDA device; on {device.type} name a folder')
        self.store: Store | None = None if place is None else PinnedStore() if place == "pinned" else FileStore(place)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__ | {"_stream": None, "_active": []}

    def choose(self, nbytes: Sequence[int], room: int) -> tuple[frozenset[int], int]:
        """The layers to page so that the others fit into `room` bytes, the biggest first; and the bytes by which they do not.

        On a CUDA device the copies of `NEAR` layers take their share of the room.
        """
        left = sum(nbytes)
        if left <= room:
            return frozenset(), 0
        if self.store is None:
            return frozenset(), left - room
        order = sorted(range(len(nbytes)), key=lambda i: -nbytes[i])
        room -= NEAR * nbytes[order[0]] if self._staged else 0
        count = 0
        while count < len(order) and left > room:
            left -= nbytes[order[count]]
            count += 1
        return frozenset(order[:count]), max(0, left - room)

    def least_room(self, nbytes: Sequence[int], host: int) -> int:
        """Bytes that must be resident at least, where `host` bytes may be paged."""
        if self.store is None or not nbytes:
            return sum(nbytes)
        left, paged, near = sum(nbytes), 0, NEAR * max(nbytes) if self._staged else 0
        least = left
        for size in sorted(nbytes, reverse=True):
            left, paged = left - size, paged + size
            if paged <= host:
                least = min(least, left + near)
        return least

    def excess(self, nbytes: Sequence[int], room: int, host: int) -> int:
        """Bytes by which the layers exceed the `room` of resident ones or the `host` bytes of paged ones."""
        layers, over = self.choose(nbytes, room)
        return max(over, sum(nbytes[i] for i in layers) - host, 0)

    @contextmanager
    def moved(self, nbytes: Sequence[int], room: int, states: Sequence[TensorState | None]) -> Iterator[None]:
        """Page for new sizes of the layers, which the body gives to their states: out before it, in after it."""
        wanted, _ = self.choose(nbytes, room)
        here = [(i, state) for i, state in enumerate(states) if state is not None]
        for i, state in here:
            if i in wanted:
                self._page_out(state)
        yield
        self.layers = wanted
        for i, state in here:
            if i not in wanted:
                self._page_in(state)
            elif isinstance(state.encoded, Paged):
                state.encoded.tidy()
        self.settle()

    def adopt(self, state: TensorState, layer: int | None) -> None:
        """Page a new state if its layer is a paged one."""
        if layer in self.layers:
            self._page_out(state)

    def _page_out(self, state: TensorState) -> None:
        if self.store is None or isinstance(state.encoded, Paged):
            return
        slots, state.encoded = state.encoded, Staged(self.store, {}, self) if self._staged else Paged(self.store, {})
        state.version += 1
        try:
            for slot in list(slots):
                state.encoded[slot] = slots[slot]
                del slots[slot]                              # the old bytes go slot by slot
        except OSError:
            state.encoded = dict(state.encoded) | slots      # where the disk is full nothing is lost
            raise

    def _page_in(self, state: TensorState) -> None:
        if not isinstance(state.encoded, Paged):
            return
        self.settle()
        state.version += 1
        state.encoded = {slot: far.to(self.device) for slot, far in state.encoded.items()}

    @property
    def _staged(self) -> bool:
        """Whether what is paged is worked on through copies: the host's memory is not the device's."""
        return self.device.type == "cuda"

    @staticmethod
    def paged_bytes(state: TensorState) -> int:
        """Bytes of a state that are in the store."""
        return sum(encoded.nbytes for encoded in state.encoded.values()) if isinstance(state.encoded, Paged) else 0

    @property
    def near_bytes(self) -> int:
        """Bytes of the copies on the device."""
        return sum(staged.near_bytes for staged in self._active)

    def use(self, staged: Staged) -> None:
        """Note that a layer has copies on the device; the one that was used longest ago drops its own."""
        self._active = [other for other in self._active if other is not staged] + [staged]
        while len(self._active) > NEAR:
            self._active.pop(0).settle()

    def prefetch(self, states: Sequence[TensorState]) -> None:
        """Start to copy paged states to the device; nothing to do for any other."""
        for staged in (state.encoded for state in states if isinstance(state.encoded, Staged)):
            if self._stream is None and self.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            staged.prefetch(self._stream)

    def settle(self) -> None:
        """Have the host hold all that is paged, and the device no copies of it."""
        for staged in self._active:
            staged.settle()
        if self._active and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._active = []
