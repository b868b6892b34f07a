"""The stored state of one parameter tensor under a config: which codec holds what, how many bytes, how it changes shape.

Slots: `exp_avg`, `exp_avg_sq`, `projector` (rank > 0), `residual` (error feedback) and `held` (gradients released during
backward). Each is an `Encoded`; nothing dense outlives a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from mango.codecs import (
    SIGNED,
    UNSIGNED,
    Codec,
    Encoded,
    Shape,
    component,
    flatten,
    gradient_codec,
    matrix_shape,
    safe,
    unflatten,
)
from mango.config import CompressionConfig
from mango.rules import adamw_direction, adamw_update, orthonormal, range_basis

REFRESH_EVERY = 50                     # steps between refreshes of a projector
COMPONENTS = {
    "exp_avg": "momentum",
    "exp_avg_sq": "variance",
    "residual": "residual",
    "held": "gradients",
    "projector": "projector",
}


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """What the optimizer decides for all tensors alike."""

    error_feedback: bool = True
    residual_bits: int = 8
    release_gradients: bool = False
    compressor: "Compressor | None" = None                   # somebody's own gradient compression, in place of the codecs


class Compressor(Protocol):
    """Somebody's own gradient compression: gives back the compressed tensor, dense, and the error to feed back."""

    def compress(self, tensor: Tensor, bits: int, sparsity_ratio: float) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Hyper:
    """The numbers of one update, from the parameter group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(slots=True, eq=False)
class Target:
    """One parameter tensor: where it lives, and which layer it is (None: too small to be one)."""

    name: str
    param: Tensor
    group: dict[str, Any]
    layer: int | None


def needs_residual(config: CompressionConfig, options: StorageOptions) -> bool:
    """Whether the gradient codec is biased enough for feedback: dropped entries, or nearest rounding at 8 bits and fewer."""
    biased = config.gradient_bits <= 8 or config.sparsity > 0 or options.compressor is not None
    return options.error_feedback and biased


def subspace(shape: Shape, rank: int) -> tuple[int, int, int]:
    """(m, n, r) of the matrix whose smaller side m is projected to r <= m dimensions."""
    rows, columns = matrix_shape(shape)
    small, large = min(rows, columns), max(rows, columns)
    return small, large, min(rank, small)


@lru_cache(maxsize=1 << 16)
def slots(shape: Shape, config: CompressionConfig, options: StorageOptions) -> dict[str, tuple[Codec, Shape]]:
    """The codec and dense shape of every slot that a tensor of `shape` has under `config`. Cached: do not change it."""
    layout: dict[str, tuple[Codec, Shape]] = {}
    if config.rank:
        small, large, rank = subspace(shape, config.rank)
        layout["projector"] = (SIGNED[config.factor_bits_p], (small, rank))
        layout["exp_avg"] = (SIGNED[config.factor_bits_q], (rank, large))
        layout["exp_avg_sq"] = (UNSIGNED[config.variance_bits], (rank, large))
    else:
        layout["exp_avg"] = (SIGNED[config.momentum_bits], shape)
        layout["exp_avg_sq"] = (UNSIGNED[config.variance_bits], shape)
    if needs_residual(config, options):
        layout["residual"] = (SIGNED[options.residual_bits], shape)
    if options.release_gradients:
        layout["held"] = (gradient_codec(config.gradient_bits, config.sparsity), shape)
    return layout


@lru_cache(maxsize=1 << 16)
def predicted_bytes(shape: Shape, config: CompressionConfig, options: StorageOptions) -> int:
    """Exactly the bytes that `TensorState` will store."""
    return sum(codec.nbytes(slot_shape) for codec, slot_shape in slots(shape, config, options).values())


@dataclass(slots=True)
class TensorState:
    """What is kept for one parameter tensor between steps."""

    shape: Shape
    config: CompressionConfig
    options: StorageOptions
    step: int = 0
    encoded: dict[str, Encoded] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(enc.nbytes for enc in self.encoded.values())

    def components(self) -> dict[str, int]:
        """Bytes by what they are for; scales and indices are counted apart from the values they belong to."""
        report: dict[str, int] = {}
        for slot, enc in self.encoded.items():
            for part, tensor in enc.parts.items():
                what = component(part) or COMPONENTS[slot]
                report[what] = report.get(what, 0) + tensor.untyped_storage().nbytes()
        return report

    def to_plain(self) -> dict[str, Any]:
        """As plain tensors (copies) and JSON-able scalars."""
        plain: dict[str, Any] = {"step": self.step, "config": self.config.to_dict(), "shape": list(self.shape)}
        plain["slots"] = list(self.encoded)
        for slot, encoded in self.encoded.items():
            plain |= flatten(encoded, slot)
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in plain.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], options: StorageOptions, device: torch.device) -> "TensorState":
        """Undo `to_plain`."""
        encoded = {slot: unflatten(plain, slot, device) for slot in plain["slots"]}
        return cls(tuple(plain["shape"]), CompressionConfig.from_dict(plain["config"]), options, plain["step"], encoded)

    def create(self, device: torch.device) -> None:
        """Encode zeros in every slot but `held`, which appears with the first gradient, and a projector, which needs one."""
        for slot, (codec, shape) in slots(self.shape, self.config, self.options).items():
            if slot != "held":
                self.encoded[slot] = codec.encode(torch.zeros(shape, device=device))

    def _store(self, slot: str, dense: Tensor, generator: Generator | None) -> None:
        codec, _ = slots(self.shape, self.config, self.options)[slot]
        self.encoded.pop(slot, None)                             # the old bytes go before the new ones come
        self.encoded[slot] = codec.encode(dense, generator)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Dense float32 first and second moments, of the tensor's shape."""
        exp_avg, exp_avg_sq = self.encoded["exp_avg"].decode(), self.encoded["exp_avg_sq"].decode()
        if not self.config.rank:
            return exp_avg, exp_avg_sq
        p = self.encoded["projector"].decode()                   # (m, r)
        return self._from_matrix(p @ exp_avg), self._from_matrix(p.square() @ exp_avg_sq)

    def transcode(self, config: CompressionConfig, generator: Generator) -> None:
        """Store the same state under another config. Bytes never exceed the larger of before and after."""
        old, self.config = self.config, config
        after = slots(self.shape, config, self.options)
        device = self.encoded["exp_avg_sq"].device
        for slot in set(self.encoded) - set(after) - {"projector"}:
            del self.encoded[slot]                               # with its feedback gone, a residual has no receiver

        def growth(slot: str) -> int:
            codec, shape = after[slot]
            return codec.nbytes(shape) - (self.encoded[slot].nbytes if slot in self.encoded else 0)

        if "held" in self.encoded and growth("held") < 0:        # makes room for moments that leave a subspace
            self.encoded["held"] = after["held"][0].encode(self.encoded.pop("held").decode(), generator)
        if old.rank != config.rank:
            self._resubspace(old, config, generator)

        made = {"held"} - set(self.encoded)                      # appears with the next gradient
        # What shrinks goes first; ties by name, not in the order of a set, or runs would not repeat across processes.
        for slot in sorted(sorted(set(after) - made), key=growth):
            codec, shape = after[slot]
            if slot not in self.encoded:
                self.encoded[slot] = codec.encode(torch.zeros(shape, device=device))
            elif codec.name != self.encoded[slot].codec or growth(slot):
                dense = self.encoded.pop(slot).decode()
                self.encoded[slot] = codec.encode(dense, generator)

    def _resubspace(self, old: CompressionConfig, config: CompressionConfig, generator: Generator) -> None:
        """Move the moments between full space and a subspace, or between subspaces of different rank."""
        self.config = old
        exp_avg, exp_avg_sq = self.moments()
        self.config = config
        for slot in ("projector", "exp_avg", "exp_avg_sq"):
            self.encoded.pop(slot, None)
        if config.rank:
            _, large, rank = subspace(self.shape, config.rank)
            matrix = self._to_matrix(exp_avg)
            unit = matrix / safe(matrix.abs().max())                            # so that powers neither overflow nor vanish
            p = range_basis(unit, torch.randn(large, rank, device=matrix.device, generator=generator))
            self._store("projector", p, generator)
            exp_avg, exp_avg_sq = p.T @ matrix, p.square().T @ self._to_matrix(exp_avg_sq)
        self._store("exp_avg", exp_avg, generator)
        self._store("exp_avg_sq", exp_avg_sq, generator)

    def _to_matrix(self, x: Tensor) -> Tensor:
        """As a matrix with the smaller side first: (m, n), m <= n."""
        matrix = x.reshape(matrix_shape(self.shape))
        return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        rows, columns = matrix_shape(self.shape)
        return (matrix.T if rows > columns else matrix).reshape(self.shape)

    def compress_gradient(self, grad: Tensor, generator: Generator) -> Tensor:
        """The gradient as its codec gives it back (float32), with the residual fed in and its new value stored.

        With feedback rounding is to nearest and the error is carried over (Karimireddy et al. 2019, algorithm 2);
        without, rounding is stochastic and needs none.
        """
        config, own = self.config, self.options.compressor
        if not config.compresses_gradient and own is None:
            return grad.float()
        feedback = needs_residual(config, self.options)
        wanted = grad.float() + self.encoded["residual"].decode() if feedback else grad.float()
        if own is not None:
            applied, error = own.compress(wanted, config.gradient_bits, config.sparsity)
        else:
            codec = gradient_codec(config.gradient_bits, config.sparsity)
            applied = codec.encode(wanted, None if feedback else generator).decode()
            error = wanted - applied
        if feedback:
            self._store("residual", error, generator)
        return applied

    def hold_gradient(self, grad: Tensor, generator: Generator) -> None:
        """Add a gradient to the encoded one that is held for the next step."""
        codec = gradient_codec(self.config.gradient_bits, self.config.sparsity)
        wanted = grad.float()
        if "held" in self.encoded:
            wanted = wanted + self.encoded.pop("held").decode()
        if not needs_residual(self.config, self.options):
            self.encoded["held"] = codec.encode(wanted, generator)
            return
        wanted = wanted + self.encoded["residual"].decode()
        self.encoded["held"] = codec.encode(wanted)
        self._store("residual", wanted - self.encoded["held"].decode(), generator)

    def update(self, param: Tensor, grad: Tensor, hyper: Hyper, generator: Generator) -> tuple[Tensor, Tensor]:
        """One AdamW step on `param` (float32, in place) with the stored moments; returns the dense moments before storing."""
        self.step += 1
        config = self.config
        if config.rank:
            return self._update_in_subspace(param, grad, hyper, generator)
        exp_avg, exp_avg_sq = self.encoded["exp_avg"].decode(), self.encoded["exp_avg_sq"].decode()
        if (config.momentum_bits, config.variance_bits) == (32, 32):                # in place: the decoded tensors are the stored
            adamw_update(param, grad, exp_avg, exp_avg_sq, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps,
                         weight_decay=hyper.weight_decay, step=self.step)  # fmt: skip
            return exp_avg, exp_avg_sq
        moved = adamw_direction(grad, exp_avg, exp_avg_sq, betas=hyper.betas, eps=hyper.eps, step=self.step)
        self._move(param, moved, hyper)
        self._store_moments(exp_avg, exp_avg_sq, generator)
        return exp_avg, exp_avg_sq

    @staticmethod
    def _move(param: Tensor, moved: Tensor, hyper: Hyper) -> None:
        if hyper.weight_decay:
            param.mul_(1 - hyper.lr * hyper.weight_decay)
        param.add_(moved, alpha=-hyper.lr)

    def _store_moments(self, exp_avg: Tensor, exp_avg_sq: Tensor, generator: Generator) -> None:
        """Signed 8-bit and bfloat16 first moments round to nearest: their increments exceed half a bin; all else needs chance."""
        bits = self.config.factor_bits_q if self.config.rank else self.config.momentum_bits
        if bits < 32:
            self._store("exp_avg", exp_avg, generator if bits < 8 else None)
        if self.config.variance_bits < 32:
            self._store("exp_avg_sq", exp_avg_sq, generator)

    def _update_in_subspace(self, param: Tensor, grad: Tensor, hyper: Hyper, generator: Generator) -> tuple[Tensor, Tensor]:
        """AdamW on P^T G, moved back by P (Zhao et al. 2024, algorithm 2), with a warm-started projector."""
        if (self.step - 1) % REFRESH_EVERY == 0:
            self._refresh(grad, generator)
        p = self.encoded["projector"].decode()                                      # (m, r)
        exp_avg, exp_avg_sq = self.encoded["exp_avg"].decode(), self.encoded["exp_avg_sq"].decode()  # (r, n)
        inside = p.T @ self._to_matrix(grad)
        moved = adamw_direction(inside, exp_avg, exp_avg_sq, betas=hyper.betas, eps=hyper.eps, step=self.step)
        self._move(param, self._from_matrix(p @ moved), hyper)
        self._store_moments(exp_avg, exp_avg_sq, generator)
        return self._from_matrix(p @ exp_avg), self._from_matrix(p.square() @ exp_avg_sq)

    def _refresh(self, grad: Tensor, generator: Generator) -> None:
        """One power iteration from the projector in force (from random columns three), and the moments carried over."""
        matrix = self._to_matrix(grad.float())
        matrix = matrix / safe(matrix.abs().max())                                  # so that powers neither overflow nor vanish
        _, large, rank = subspace(self.shape, self.config.rank)
        old = self.encoded["projector"].decode()
        if not bool(old.any()):                                                     # the first gradient: nothing to carry over
            start = torch.randn(large, rank, device=matrix.device, generator=generator)
            self._store("projector", range_basis(matrix, start), generator)
            return
        keep = 1e-3 * matrix.norm().square().clamp(min=1)                           # old columns outlast a zero gradient
        new = orthonormal(matrix @ (matrix.T @ old) + keep * old)
        turn = new.T @ old                                                          # (r, r)
        exp_avg, exp_avg_sq = self.encoded["exp_avg"].decode(), self.encoded["exp_avg_sq"].decode()
        self._store("projector", new, generator)
        exp_avg, exp_avg_sq = turn @ exp_avg, turn.square() @ exp_avg_sq
        self._store("exp_avg", exp_avg, generator)
        self._store("exp_avg_sq", exp_avg_sq, generator)

    def error(self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
        """Relative l2 error that storing adds to the direction m / sqrt(v), against the dense moments of the same step.

        In a subspace the part of the gradient outside it counts too, added in quadrature.
        """
        stored_avg, stored_sq = self.moments()
        ideal = direction(exp_avg, exp_avg_sq)
        error: Tensor = (direction(stored_avg, stored_sq) - ideal).norm() / safe(ideal.norm())
        if not self.config.rank:
            return error
        p, matrix = self.encoded["projector"].decode(), self._to_matrix(grad)
        outside: Tensor = (matrix - p @ (p.T @ matrix)).norm() / safe(matrix.norm())
        return torch.hypot(error, outside)


def dense_gradient(name: str, gradient: Tensor) -> Tensor:
    """The gradient, if it is dense: TypeError otherwise."""
    if gradient.is_sparse:
        raise TypeError(f"{name} has a sparse gradient; MANGO takes dense ones (Embedding(sparse=False))")
    return gradient


def direction(exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    """m / sqrt(v), zero where v is."""
    return torch.where(exp_avg_sq > 0, exp_avg / safe(exp_avg_sq).sqrt(), 0.0)

