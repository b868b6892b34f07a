"""`mango.fused` on a CUDA device: the same update of many tensors, by the kernels of `mango.kernels`, without waiting for it.

Everything that a step needs is on the device: addresses and chunks, numbers of the parameter groups, every tensor's count of
steps. The host fills tables, uploads what changed and launches. What the step found stays on the device until it is asked for,
and which gradients were not finite is told by `settle`, at a time when the host waits anyway. So a step can be captured in a
CUDA graph, after one that was not, and its learning rate may be a tensor.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango import native, noise
from mango.blockwise import NF4_LEVELS
from mango.codecs import matrix_shape
from mango.fused import Moves, Work
from mango.rules import RULES, Hyper
from mango.state import Target, TensorState
from mango.statistics import NORM_DECAY, GradientStatistics

NUMBERS = 15                                 # of a tensor at a step
ALIGNMENT = 16                               # bytes of the widest access
WARPS = 4                                    # per program
SMALL = 1 << 24                              # entries of all tensors together, up to which chunks are short
KEPT_PLANS = 8                               # tables of earlier sets of tensors, for those that come by turns
BY_CHANCE = ("lognormal6", "nf4", "ternary2")  # formats of first moments that the kernels round so; the others to nearest
WIDEST = 1 << 27                             # columns of a matrix in factors
FACTORED, LOG6 = native.format_number("factored"), native.format_number("lognormal6")


class Combination(NamedTuple):
    """What one launch of `update` is compiled for: numbers as in native.c, but for the last three."""

    rule: int
    param: int
    grad: int
    m: int
    v: int
    correction_bits: int
    maximize: bool
    within: bool                             # factors: the columns are a multiple of 128
    vector: bool                             # addresses are multiples of 16 bytes, the entries of 8


@dataclass(slots=True)
class DeviceMoves:
    """`Moves` on the device, by tensor: (n,) each. Norms of updates and moments only where they were asked for."""

    numbers: Tensor                          # (n, NUMBERS) float32, as kernels.prepare leaves them
    sums: Tensor                             # (n, 4) float32: move^2, parameter^2, moment^2, moment times gradient
    told: bool = False                       # the host knows, and does with it what is to be done

    @property
    def finite(self) -> Tensor:
        return self.numbers[:, 0] > 0

    @property
    def grad_norm(self) -> Tensor:
        return self.numbers[:, 1].sqrt()

    @property
    def moved(self) -> Tensor:
        return self.sums[:, 0].sqrt()

    @property
    def param_norm(self) -> Tensor:
        return self.sums[:, 1].sqrt()

    @property
    def alignment(self) -> Tensor:
        cosine = self.sums[:, 3] / (self.sums[:, 2].sqrt() * self.grad_norm)
        return torch.nan_to_num(cosine, nan=0.0, posinf=0.0, neginf=0.0)

    def on_host(self) -> Moves:
        """The same as the CPU kernels give it. Waits for the device."""
        self.told = True
        columns = (self.grad_norm, self.moved, self.param_norm, self.alignment)
        table = torch.stack([self.finite.float(), *columns]).double().cpu().numpy()
        return Moves(table[0] > 0, table[1], table[2], table[3], table[4])


@dataclass(slots=True)
class Plan:
    """Tables for one set of tensors, and what to launch over them."""

    host: NDArray[np.int64]                                  # (n, columns of kernels.COLUMNS)
    table: Tensor                                            # the same on the device
    spare: Tensor                                            # page-locked, for an upload while a graph is captured
    updates: dict[Combination, Tensor]                       # (C, 2) row, first entry
    squares: dict[tuple[int, bool], Tensor]                  # by type of gradient and vector: (C, 2) row, first entry
    matrices: dict[tuple[int, bool, int], Tensor]            # and by width of a tile: (S, 3) row, band, tile
    segments: Tensor | None                                  # (S, 3) row, kind, first factor
    hypers: set[tuple[int, str, bool]]                       # as `_hyper_place` takes them
    partials: int                                            # numbers of scratch memory: chunks of `updates`,
    sums: int                                                # sums of squares of chunks and tiles,
    scratch: int                                             # sums of squares by row and by column


def chunk_table(tensors: Sequence[tuple[int, int]], chunk: int) -> NDArray[np.int64]:
    """Tensors (row of the table, entries) cut into chunks: (C, 2) row and first entry.

    >>> chunk_table([(0, 5), (3, 2)], chunk=4).tolist()
    [[0, 0], [0, 4], [3, 0]]
    """
    rows, numels = np.array(tensors, dtype=np.int64).T
    counts = -(-numels // chunk)
    first = np.repeat(counts.cumsum() - counts, counts)
    return np.stack([np.repeat(rows, counts), (np.arange(counts.sum()) - first) * chunk], 1)


def tile_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """(width of a tile, tiles of a row, bands of rows) in which a matrix is summed: some 2,000 programs where it is large."""
    width = min(512, max(64, 1 << (columns - 1).bit_length()))
    tiles = -(-columns // width)
    return width, tiles, max(1, min(-(-rows // 128), -(-2048 // tiles)))


class FusedUpdateCUDA:
    """Updates tensors on one CUDA device. Keeps one row per tensor, filled anew when its state was stored anew."""

    def __init__(self, targets: Sequence[Target], statistics: GradientStatistics, seed: int, strict: bool = False) -> None:
        self._row = {target: i for i, target in enumerate(targets)}
        self._statistics, self._strict, self._warned = statistics, strict, False
        self.device = statistics.norm.device
        self._keys = [noise.step_key(seed, i, 0) for i in range(len(targets))]
        self._groups = list({id(target.group): target.group for target in targets}.values())
        self._group_place = {id(group): i for i, group in enumerate(self._groups)}
        total = sum(target.local.numel() for target in targets)
        self._chunk, self._sum_chunk = (4096, 16384) if total <= SMALL else (16384, 65536)
        self._states: list[TensorState | None] = [None] * len(targets)
        self._versions = [-1] * len(targets)
        self._steps = [0] * len(targets)                     # what the device has, but for gradients left out
        self._odd = [False] * len(targets)                   # no vectors, whatever parameter and gradient are
        self._known: dict[Target, tuple[TensorState, tuple[Any, ...], bool]] = {}        # what `covers` said, of what
        self._compiled: dict[tuple[Combination, bool], bool] = {}
        self._kernels: Any = None                            # False where they cannot be had
        self._plans: dict[Any, Plan] = {}
        self._kept: list[Any] = []                           # what captured graphs read and copy from
        self._clock_host = self._skipped = 0
        self._measured: tuple[DeviceMoves, Tensor] | None = None                     # the last measure: norms of updates by layer

    def _load(self) -> bool:
        """Import the kernels, and make what all launches share. False where that failed."""
        if self._kernels is None:
            try:
                from mango import kernel_formats, kernels
            except ImportError as error:
                self._kernels = False
                self._failed(f"Triton is missing ({error})")
                return False
            self._kernels = kernels
            self._column = {name: i for i, name in enumerate(kernels.COLUMNS)}
            self._table = np.zeros((len(self._row), len(kernels.COLUMNS)), dtype=np.int64)
            self._hyper = np.zeros((2 * len(self._groups) * len(native.RULES), len(kernels.HYPERS)))
            self._hyper_table = torch.zeros(self._hyper.shape, dtype=torch.float64, device=self.device)
            self._counts = torch.zeros(len(self._row), 2, dtype=torch.int64, device=self.device)   # steps, gradients left out
            self._clock = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._levels = torch.tensor(kernel_formats.nf4_table(NF4_LEVELS), device=self.device)
        return self._kernels is not False

    def _failed(self, reason: str) -> None:
        message = f"MANGO's CUDA kernels are not available, steps will be slower: {reason}"
        if self._strict:
            raise RuntimeError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    # ---- what is taken ----
    def covers(self, target: Target, state: TensorState) -> bool:
        """Whether the tensor's update can be fused. Compiles what it needs; where that fails there is one warning."""
        param = target.local
        mark = (state.version, param.dtype, param.device, param.shape, param.is_contiguous(), target.group["maximize"])
        known = self._known.get(target)
        if known is None or known[0] is not state or known[1] != mark:
            known = self._known[target] = (state, mark, self._covers(target, param, state))
        return known[2]

    def _covers(self, target: Target, param: Tensor, state: TensorState) -> bool:
        plain = type(param) in (Tensor, torch.nn.Parameter) and param.device == self.device and param.is_contiguous()
        if not plain or param.dtype not in native.PARAM_TYPES or param.numel() == 0 or param.shape != state.shape:
            return False
        if state.config.rank or state.rule not in native.RULES or not self._load():
            return False
        exp_avg, exp_avg_sq, chances = state.encoded.get("exp_avg"), state.encoded.get("exp_avg_sq"), state.chances
        if exp_avg is not None and (exp_avg.device != self.device or chances[0] != (exp_avg.codec in BY_CHANCE)):
            return False
        if exp_avg_sq is not None and (exp_avg_sq.device != self.device or chances[1] == (exp_avg_sq.codec == "float32")):
            return False
        if matrix_shape(state.shape)[1] >= WIDEST and exp_avg_sq is not None and exp_avg_sq.codec == "factored":
            return False
        coded = state.options.release_gradients or state.options.compressor is not None or state.config.compresses_gradient
        return self._compiles(self._combination(target, state, native.PARAM_TYPES[torch.float32 if coded else param.dtype], True))

    @staticmethod
    def accepts(gradient: Tensor) -> bool:
        """Whether the kernels can read this gradient."""
        plain = gradient.layout == torch.strided and type(gradient) in (Tensor, torch.nn.Parameter)
        return plain and gradient.dtype in native.PARAM_TYPES and gradient.is_contiguous()

    @staticmethod
    def _combination(target: Target, state: TensorState, grad: int, vector: bool) -> Combination:
        moments = (state.encoded.get(slot) for slot in ("exp_avg", "exp_avg_sq"))
        m, v = (native.FORMAT_NONE if moment is None else native.format_number(moment.codec) for moment in moments)
        bits = 0 if state.correction is None else 8 * state.correction.element_size()
        within = v != FACTORED or matrix_shape(state.shape)[1] % 128 == 0
        param = native.PARAM_TYPES[target.local.dtype]
        return Combination(native.RULES[state.rule], param, grad, m, v, bits, bool(target.group["maximize"]), within, vector)

    def _options(self, combination: Combination, measure: bool) -> dict[str, Any]:
        """How `update` is compiled for a combination."""
        four = 0 in (combination.param, combination.m, combination.v)             # float32: 16 bytes are 4 entries, not 8
        options: dict[str, Any] = {"MEASURE": measure, "CHUNK": self._chunk, "ROWS": WARPS * 32 * (4 if four else 8) // 128}
        names = ("RULE", "P", "G", "M", "V", "BITS", "MAXIMIZE", "WITHIN", "VECTOR")
        options |= dict(zip(names, combination, strict=True)) | {"num_warps": WARPS, "enable_fp_fusion": True}
        registers = 128 if combination.m == LOG6 else 96                          # five, or four programs to a multiprocessor
        return options | ({"maxnreg": registers} if combination.vector and not measure else {})

    def _compiles(self, combination: Combination, measure: bool = False) -> bool:
        """Whether `update` can be had for a combination; tried once."""
        place = (combination, measure)
        if place not in self._compiled:
            try:
                self._compile(combination, measure)
                self._compiled[place] = True
            except Exception as error:
                self._compiled[place] = False
                self._failed(f"{type(error).__name__}: {str(error)[:500]}")
                if self._strict:
                    raise
        return self._compiled[place]

    def _compile(self, combination: Combination, measure: bool) -> None:
        arguments = (self._counts, self._levels, self._counts, self._clock, self._levels, self._levels)
        with self._on_device():
            made = self._kernels.update.warmup(*arguments, grid=(1,), **self._options(combination, measure))
            if hasattr(made, "_init_handles"):                                    # loads it, which may fail too
                made._init_handles()

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # ---- a step ----
    def run(self, work: Sequence[Work], step: int, measure: bool) -> DeviceMoves:
        """Update each tensor by its gradient; those that are not finite are left as they are.

        Gradients are such as `accepts` takes. Statistics are taken of the fresh ones.
        """
        if not self._load():
            raise RuntimeError("nothing can be fused, as `covers` says")
        self._keep_moved()
        with self._on_device():
            plan = self._plan(work)
            if self._capturing():
                self._kept.append(plan)
            if step == self._clock_host + 1:
                self._clock.add_(1)
            else:
                self._clock.fill_(step)
            self._clock_host = step
            self._set_hypers(plan.hypers)
            moves = self._launch(plan, measure and all(self._compiles(c, True) for c in plan.updates))
        torch.autograd.graph.increment_version([w.target.local for w in work])    # backward through old weights is an error
        for w in work:
            w.state.step += 1                                                     # until `settle` says otherwise
            self._steps[self._row[w.target]] += 1
        return moves

    def settle(self) -> int:
        """Take the device's counts of steps into the states. Returns how many gradients were left out since the last time."""
        if not self._kernels:
            return 0
        self._keep_moved()
        steps, skipped = self._counts.T.tolist()
        for row, state in enumerate(self._states):
            if state is not None and state.step == self._steps[row]:
                state.step = self._steps[row] = steps[row]
        before, self._skipped = self._skipped, sum(skipped)
        return self._skipped - before

    def _keep_moved(self) -> None:
        """Put the norms of the last measured updates into the statistics, unless the host does. Not at once: a probe of the same
        step needs those of the step before."""
        if self._measured is not None:
            (moves, moved), self._measured = self._measured, None
            if not moves.told:
                self._statistics.moved.copy_(torch.where(moved < 0, self._statistics.moved, moved))

    def _launch(self, plan: Plan, measure: bool) -> DeviceMoves:
        k, table, tables, n = self._kernels, plan.table, self._statistics, len(plan.host)
        moved = torch.full_like(tables.moved, -1.0) if measure else tables.moved               # not written without measure
        sums, scratch, partials = self._empty(plan.sums), self._empty(plan.scratch), self._empty(4 * plan.partials * measure)
        numbers, results = self._empty(n, NUMBERS), self._empty(n, 4)
        common = {"enable_fp_fusion": True}
        for (grad, vector), chunks in plan.squares.items():
            k.square_sums[(len(chunks),)](table, chunks, sums, G=grad, VECTOR=vector, CHUNK=self._sum_chunk, WIDTH=4096, **common)
        for (grad, vector, width), tiles in plan.matrices.items():
            shape = {"ROWS": 4096 // width, "WIDTH": width}
            k.matrix_sums[(len(tiles),)](table, tiles, sums, scratch, G=grad, VECTOR=vector, **shape, **common)
        k.prepare[(n,)](table, self._hyper_table, sums, self._counts, numbers, WIDTH=1024, **common)
        for combination, chunks in plan.updates.items():
            options = self._options(combination, measure)
            k.update[(len(chunks),)](table, numbers, chunks, self._clock, self._levels, partials, **options)
        k.finish[(n,)](
            table, numbers, partials, results, tables.mean, tables.square, tables.previous, tables.cosine, tables.norm,
            tables.running_norm, tables.count, moved, DECAY=NORM_DECAY, MEASURE=measure, WIDTH=256, **common,
        )  # fmt: skip
        if plan.segments is not None:
            k.finish_factors[(len(plan.segments),)](table, numbers, plan.segments, scratch, WIDTH=512, **common)
        moves = DeviceMoves(numbers, results)
        self._measured = (moves, moved) if measure else None
        return moves

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    # ---- tables ----
    def _upload(self, array: NDArray[Any], into: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
        """A copy on the device, which the host does not wait for. A captured one is repeated from `spare`, which is kept."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            host = spare.copy_(host) if spare is not None and self._capturing() else host.pin_memory()
            if self._capturing():
                self._kept.append(host)
        if into is None:
            into = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return into.copy_(host, non_blocking=True)

    def _hyper_place(self, group: int, rule: str, keeps: bool) -> int:
        """Row of the table of numbers, for a group (its id), a rule, and whether a first moment is kept."""
        return (self._group_place[group] * len(native.RULES) + native.RULES[rule]) * 2 + keeps

    def _set_hypers(self, used: set[tuple[int, str, bool]]) -> None:
        """Numbers of the parameter groups, where they changed; a learning rate on the device is copied there."""
        wanted, on_device = self._hyper.copy(), []
        for number, rule, keeps in used:
            group, decoupled = self._groups[self._group_place[number]], RULES[rule].decoupled
            place, lr = self._hyper_place(number, rule, keeps), group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device.append((place, lr))
                lr = wanted[place, 0]
            hyper = Hyper.of({**group, "lr": lr}, rule)
            hyper = hyper if keeps else hyper.without_momentum()
            beta1, decay = hyper.momentum if rule == "sgd" else hyper.betas[0], hyper.weight_decay
            wanted[place] = (hyper.lr, beta1, hyper.betas[1], hyper.eps, decay * decoupled, decay * (not decoupled))
        if not np.array_equal(wanted, self._hyper):
            self._upload(wanted, self._hyper_table)
            self._hyper = wanted
        for place, lr in on_device:
            self._hyper_table[place, 0].copy_(lr.reshape(()))

    def _plan(self, work: Sequence[Work]) -> Plan:
        """The plan for these tensors, with the addresses of this step."""
        marks, addresses, stale = [], np.empty((len(work), 2), dtype=np.int64), []
        for i, (target, state, gradient, fresh, _) in enumerate(work):
            row = self._row[target]
            if self._versions[row] != state.version or self._states[row] is not state:
                self._fill(row, target, state)
            if self._steps[row] != state.step:
                stale.append(row)
                self._steps[row] = state.step
            param, grad = target.local.data_ptr(), gradient.data_ptr()
            addresses[i] = param, grad
            vector = not (self._odd[row] or param % ALIGNMENT or grad % ALIGNMENT)
            types = (native.PARAM_TYPES[gradient.dtype], native.PARAM_TYPES[target.local.dtype])
            marks.append((row, state.version, *types, vector, fresh, bool(target.group["maximize"]), state.has_momentum))
        if stale:
            steps = self._upload(np.array([[row, self._steps[row]] for row in stale], dtype=np.int64))
            self._counts[:, 0].index_copy_(0, steps[:, 0], steps[:, 1])
        key = tuple(marks)
        plan = self._plans.get(key)
        if plan is None:
            while len(self._plans) >= KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[key] = self._build(work, marks, addresses)
        elif not np.array_equal(addresses, plan.host[:, 2:4]):
            plan.host[:, 2:4] = addresses
            self._upload(plan.host, plan.table, plan.spare)
        return plan

    def _fill(self, row: int, target: Target, state: TensorState) -> None:
        """What stays until the state is stored anew: sizes, addresses, places."""
        if self._states[row] is not state:
            self._plans.clear()                                                   # versions are counted by each state for itself
        exp_avg, exp_avg_sq = state.encoded.get("exp_avg"), state.encoded.get("exp_avg_sq")
        m, v = ([0, 0, 0] if moment is None else native.part_pointers(moment.parts) for moment in (exp_avg, exp_avg_sq))
        numel, correction = math.prod(state.shape), 0 if state.correction is None else state.correction.data_ptr()
        values = {"numel": numel, "wide": matrix_shape(state.shape)[1], "key": self._keys[row], "place": row, "layer": -1}
        names = ("correction", "m_codes", "m_scale", "m_low", "v_codes", "v_scale", "v_low")
        values |= zip(names, (correction, *m, *v), strict=True)
        values["hyper"] = self._hyper_place(id(target.group), state.rule, state.has_momentum)
        if target.layer is not None:
            offset, count, stride = self._statistics.sample(target.layer)
            values |= {"layer": target.layer, "sample_start": offset, "sample_stride": stride, "sample_count": count}
        self._table[row] = [values.get(name, 0) for name in self._column]
        factored = exp_avg_sq is not None and exp_avg_sq.codec == "factored"
        self._odd[row] = bool(numel % 8 or (correction | m[0] | (v[1] if factored else v[0])) % ALIGNMENT)
        self._versions[row], self._states[row] = state.version, state

    def _build(self, work: Sequence[Work], marks: Sequence[tuple[Any, ...]], addresses: NDArray[np.int64]) -> Plan:
        c = self._column
        host = self._table[[mark[0] for mark in marks]]                           # (n, columns), a copy
        host[:, 2:4] = addresses
        updates, squares, matrices, segments = defaultdict(list), defaultdict(list), defaultdict(list), []
        partials = sums = scratch = 0
        for i, (w, (_, _, grad, _, vector, fresh, *_)) in enumerate(zip(work, marks, strict=True)):
            numel, wide = int(host[i, c["numel"]]), int(host[i, c["wide"]])
            combination = self._combination(w.target, w.state, grad, vector)
            updates[combination].append((i, numel))
            chunks = -(-numel // self._chunk)
            count = -(-numel // self._sum_chunk)
            if combination.v == FACTORED:
                rows, (width, tiles, bands) = numel // wide, tile_shape(numel // wide, wide)
                grid = np.stack(np.meshgrid([i], range(bands), range(tiles), indexing="ij"), -1).reshape(-1, 3)
                matrices[grad, vector and wide % 8 == 0, width].append(grid)
                for kind, factors in enumerate((rows, wide)):
                    segments.append(np.array([(i, kind, start) for start in range(0, factors, 512)]))
                host[i, [c["row_sums"], c["column_sums"], c["bands"], c["tiles"]]] = scratch, scratch + tiles * rows, bands, tiles
                scratch, count = scratch + tiles * rows + bands * wide, bands * tiles
            else:
                squares[grad, vector].append((i, numel))
            names = ("first_chunk", "chunks", "first_sum", "sums", "grad_type")
            host[i, [c[name] for name in names]] = partials, chunks, sums, count, grad
            host[i, c["sample_count"]] *= fresh
            partials, sums = partials + chunks, sums + count
        pages = torch.empty(host.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return Plan(
            host, self._upload(host), pages,
            {key: self._upload(chunk_table(members, self._chunk)) for key, members in updates.items()},
            {key: self._upload(chunk_table(members, self._sum_chunk)) for key, members in squares.items()},
            {key: self._upload(np.concatenate(grids).astype(np.int64)) for key, grids in matrices.items()},
            self._upload(np.concatenate(segments).astype(np.int64)) if segments else None,
            {(id(w.target.group), w.state.rule, w.state.has_momentum) for w in work}, partials, sums, scratch,
        )  # fmt: skip
