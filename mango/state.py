"""The stored state of one parameter tensor under a config: which codec holds what, how many bytes, how it changes shape.

Slots: `exp_avg`, `exp_avg_sq` (where the rule has one), `projector` (rank > 0), `held` (gradients released during
backward) and, by the mode of error feedback, `residual`, `estimate`, `reference`, `velocity` (`FEEDBACK`). Each
is an `Encoded`; nothing dense outlives a step. Beside a bfloat16 parameter there may be a `correction` that makes it a 24-
or 32-bit one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from mango import noise
from mango.codecs import Codec, Encoded, Shape, component, encode, flatten, safe, unflatten
from mango.config import CompressionConfig
from mango.feedback import Compress, Reference, Velocity, ef21, marina, momentum_correction, thresholded_feedback
from mango.formats import SIGNED, UNSIGNED, gradient_codec
from mango.lowrank import find, matricise, project, refresh, subspace, transport, unmatricise, unproject
from mango.rules import RULES, Hyper, adamw_update, check_positive

CPU = torch.device("cpu")
REFRESH_EVERY = 50                     # steps between refreshes of a projector
COMPONENTS = {
    "exp_avg": "momentum",
    "exp_avg_sq": "variance",
    "residual": "residual",
    "estimate": "residual",
    "reference": "residual",
    "velocity": "residual",
    "held": "gradients",
    "projector": "projector",
}
KEYS = {                               # what each slot's noise is split for
    "exp_avg": noise.MOMENTUM,
    "exp_avg_sq": noise.VARIANCE,
    "residual": noise.RESIDUAL,
    "estimate": noise.RESIDUAL,
    "reference": noise.REFERENCE,
    "velocity": noise.REFERENCE,
    "held": noise.GRADIENT,
    "projector": noise.PROJECTOR,
}


FEEDBACK: dict[bool | str, tuple[str, ...]] = {              # what each mode of error feedback keeps, at `residual_bits`
    False: (),
    True: ("residual",),
    "ef21": ("estimate",),
    "marina": ("reference", "residual"),
}


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """What the optimizer decides for all tensors alike. ValueError for options that exclude each other."""

    error_feedback: bool | str = True                        # one of `FEEDBACK`
    residual_bits: int = 8
    release_gradients: bool = False
    compressor: "Compressor | None" = None                   # somebody's own gradient compression, in place of the codecs
    feedback_threshold: float = 0.0                          # norm of the residual over the gradient's from which it is fed in
    momentum_correction: bool = False                        # accumulate velocities, not gradients, until they are sent
    exact_every: int = 10                                    # steps from one exact gradient to the next, in "marina"
    match_lr: bool = True                                    # Muon's rate follows the format, see `mango.rules.muon_pace`

    def __post_init__(self) -> None:
        mode = self.error_feedback
        if mode not in list(FEEDBACK):
            raise ValueError(f"error_feedback={mode!r} is none of {', '.join(map(repr, FEEDBACK))}")
        if not self.feedback_threshold >= 0:
            raise ValueError(f"feedback_threshold={self.feedback_threshold!r} is not a multiple of the gradient's norm, >= 0")
        check_positive(exact_every=self.exact_every)
        if self.residual_bits not in SIGNED:
            raise ValueError(f"residual_bits={self.residual_bits} is not on the menu {tuple(SIGNED)}")
        if mode is not True and (self.feedback_threshold or self.momentum_correction):
            raise ValueError(f"feedback_threshold and momentum_correction need error_feedback=True; it is {mode!r}")
        if self.feedback_threshold and self.momentum_correction:
            raise ValueError("momentum_correction sends all that is pending; give no feedback_threshold with it")
        if self.release_gradients and (isinstance(mode, str) or self.momentum_correction):
            raise ValueError("release_gradients codes each micro-batch as it comes; it takes error_feedback=True or False only")


class Compressor(Protocol):
    """Somebody's own gradient compression: gives back the compressed tensor, dense, and the error to feed back.

    A `compress` with an argument `importance_scores` is also given the root mean square of each entry's gradients so far
    (the tensor's shape, >= 0; None before the first step and where the rule keeps no second moment).
    """

    def compress(self, tensor: Tensor, bits: int, sparsity_ratio: float) -> tuple[Tensor, Tensor]: ...


def takes_importance(compressor: Compressor) -> bool:
    """Whether the compressor asks for `importance_scores`."""
    return "importance_scores" in signature(compressor.compress).parameters


@dataclass(slots=True, eq=False)
class Target:
    """One parameter tensor: where it lives, which rule moves it, and which layer it is (None: too small to be one)."""

    name: str
    param: Tensor
    group: dict[str, Any]
    rule: str
    layer: int | None
    sharded: bool = False                                    # a DTensor: `local` is what this rank has of it
    planned: Shape | None = ()                               # of the largest part on any rank; None: its state is on another
    mine: bool = True                                        # moved by this rank

    @property
    def local(self) -> Tensor:
        """What of the parameter is on this rank."""
        param: Any = self.param
        return param.to_local() if self.sharded else self.param

    @property
    def shape_here(self) -> Shape:
        """Of what this rank moves of the parameter; (0,) where another does."""
        return tuple(self.local.shape) if self.mine else (0,)

    @property
    def grad(self) -> Tensor | None:
        """What of the gradient is on this rank."""
        param: Any = self.param
        grad: Any = param.grad
        if grad is None or not self.sharded:
            return self.param.grad
        if grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        local: Tensor = grad.to_local()
        return local


def feedback_slots(config: CompressionConfig, options: StorageOptions) -> tuple[str, ...]:
    """What is kept of the gradient's coding error: nothing where the codec is good enough without, or nothing would be paid.

    It is biased where entries are dropped, and by nearest rounding at 8 bits and fewer.
    """
    biased = config.gradient_bits <= 8 or config.sparsity > 0 or options.compressor is not None
    if not biased or options.feedback_threshold == math.inf:
        return ()
    return FEEDBACK[options.error_feedback] + (("velocity",) if options.momentum_correction else ())


@lru_cache(maxsize=1 << 16)
def slots(shape: Shape, config: CompressionConfig, options: StorageOptions, rule: str) -> dict[str, tuple[Codec, Shape]]:
    """The codec and dense shape of every slot that a tensor of `shape` has under `config`. Cached: do not change it."""
    layout: dict[str, tuple[Codec, Shape]] = {}
    inside = shape
    if config.rank:
        small, large, rank = subspace(shape, config.rank)
        inside = (rank, large)
        layout["projector"] = (SIGNED[config.factor_bits_p], (small, rank))
    if config.has_momentum:
        layout["exp_avg"] = (SIGNED[config.factor_bits_q if config.rank else config.momentum_bits], inside)
    if RULES[rule].variance:
        layout["exp_avg_sq"] = (UNSIGNED[config.variance_bits], inside)
    layout |= dict.fromkeys(feedback_slots(config, options), (SIGNED[options.residual_bits], shape))
    if options.release_gradients:
        layout["held"] = (gradient_codec(config.gradient_bits, config.sparsity), shape)
    return layout


@lru_cache(maxsize=1 << 16)
def predicted_bytes(shape: Shape, config: CompressionConfig, options: StorageOptions, rule: str = "adamw") -> int:
    """Exactly the bytes that `TensorState` will store."""
    return sum(codec.nbytes(slot_shape) for codec, slot_shape in slots(shape, config, options, rule).values())


@dataclass(slots=True)
class TensorState:
    """What is kept for one parameter tensor between steps."""

    shape: Shape
    config: CompressionConfig
    options: StorageOptions
    rule: str = "adamw"
    step: int = 0
    encoded: dict[str, Encoded] = field(default_factory=dict)
    correction: Tensor | None = None                         # of a bfloat16 parameter (`mango.master`)
    device: torch.device = CPU
    version: int = 0                                         # counts the times that something was stored in a new place

    @property
    def nbytes(self) -> int:
        own = 0 if self.correction is None else self.correction.untyped_storage().nbytes()
        return own + sum(enc.nbytes for enc in self.encoded.values())

    def components(self) -> dict[str, int]:
        """Bytes by what they are for; scales and indices are counted apart from the values they belong to."""
        report: dict[str, int] = {}
        for slot, enc in self.encoded.items():
            for part, tensor in enc.parts.items():
                what = component(part) or COMPONENTS[slot]
                report[what] = report.get(what, 0) + tensor.untyped_storage().nbytes()
        if self.correction is not None:
            report["correction"] = self.correction.untyped_storage().nbytes()
        return report

    def to_plain(self) -> dict[str, Any]:
        """As plain tensors (copies) and JSON-able scalars."""
        plain: dict[str, Any] = {"step": self.step, "config": self.config.to_dict(), "shape": list(self.shape)}
        plain |= {"rule": self.rule, "slots": list(self.encoded), "correction": self.correction}
        for slot, encoded in self.encoded.items():
            plain |= flatten(encoded, slot)
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in plain.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], options: StorageOptions, device: torch.device) -> "TensorState":
        """Undo `to_plain`."""
        encoded = {slot: unflatten(plain, slot, device) for slot in plain["slots"]}
        config = CompressionConfig.from_dict(plain["config"])
        correction = None if plain["correction"] is None else plain["correction"].to(device, copy=True)
        return cls(tuple(plain["shape"]), config, options, plain["rule"], plain["step"], encoded, correction, device)

    def layout(self) -> dict[str, tuple[Codec, Shape]]:
        return slots(self.shape, self.config, self.options, self.rule)

    def create(self, device: torch.device) -> None:
        """Encode zeros in every slot but `held`, which appears with the first gradient, and a projector, which needs one."""
        self.version += 1
        self.device = device
        for slot, (codec, shape) in self.layout().items():
            if slot != "held":
                self.encoded[slot] = encode(codec, torch.zeros(shape, device=device))

    def _store(self, slot: str, dense: Tensor, key: int | None) -> None:
        codec, _ = self.layout()[slot]
        self.version += 1
        self.encoded.pop(slot, None)                             # the old bytes go before the new ones come
        self.encoded[slot] = encode(codec, dense, None if key is None else noise.split(key, KEYS[slot]))

    def moments(self) -> tuple[Tensor, Tensor | None]:
        """Dense float32 first and second moments, of the tensor's shape; zeros where no first is kept, None where the rule
        has no second one."""
        exp_avg = self._exp_avg()
        exp_avg_sq = self.encoded["exp_avg_sq"].decode() if "exp_avg_sq" in self.encoded else None
        return self._outside(exp_avg, exp_avg_sq)

    def _exp_avg(self) -> Tensor:
        if "exp_avg" in self.encoded:
            return self.encoded["exp_avg"].decode()
        _, large, rank = subspace(self.shape, self.config.rank)
        return torch.zeros((rank, large) if self.config.rank else self.shape, device=self.device)

    def _outside(self, exp_avg: Tensor, exp_avg_sq: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.config.rank:
            return exp_avg, exp_avg_sq
        p = self.encoded["projector"].decode()                   # (m, r)
        square = None if exp_avg_sq is None else unmatricise(unproject(p.square(), exp_avg_sq), self.shape)
        return unmatricise(unproject(p, exp_avg), self.shape), square

    def transcode(self, config: CompressionConfig, key: int) -> None:
        """Store the same state under another config. Bytes never exceed the larger of before and after."""
        self.version += 1
        old, self.config = self.config, config
        after = self.layout()
        for slot in set(self.encoded) - set(after) - {"projector"}:
            del self.encoded[slot]                               # with its feedback gone, a residual has no receiver
            self.version += 1

        def growth(slot: str) -> int:
            codec, shape = after[slot]
            return codec.nbytes(shape) - (self.encoded[slot].nbytes if slot in self.encoded else 0)

        if "held" in self.encoded and growth("held") < 0:        # makes room for moments that leave a subspace
            self._store("held", self.encoded["held"].decode(), key)
        if old.rank != config.rank:
            self._resubspace(old, config, key)

        made = {"held"} - set(self.encoded)                      # appears with the next gradient
        # What shrinks goes first; ties by name, not in the order of a set, or runs would not repeat across processes.
        for slot in sorted(sorted(set(after) - made), key=growth):
            codec, shape = after[slot]
            if slot not in self.encoded:
                self.version += 1
                self.encoded[slot] = encode(codec, torch.zeros(shape, device=self.device))
            elif codec.name != self.encoded[slot].codec or growth(slot):
                self._store(slot, self.encoded[slot].decode(), key)

    def _resubspace(self, old: CompressionConfig, config: CompressionConfig, key: int) -> None:
        """Move the moments between full space and a subspace, or between subspaces of different rank."""
        self.config = old
        exp_avg, exp_avg_sq = self.moments()
        self.config = config
        for slot in ("projector", "exp_avg", "exp_avg_sq"):
            self.encoded.pop(slot, None)
        self.version += 1
        if config.rank:
            matrix = matricise(exp_avg)
            p = find(matrix, config.rank, noise.generator(noise.split(key, noise.SKETCH), matrix.device))
            self._store("projector", p, key)
            exp_avg = project(p, matrix)
            exp_avg_sq = None if exp_avg_sq is None else project(p.square(), matricise(exp_avg_sq))
        if config.has_momentum:
            self._store("exp_avg", exp_avg, key)
        if exp_avg_sq is not None:
            self._store("exp_avg_sq", exp_avg_sq, key)

    def compress_gradient(self, grad: Tensor, key: int, hyper: Hyper) -> Tensor:
        """The gradient as its codec gives it back (float32), with the error fed back and what is kept of it stored.

        With feedback rounding is to nearest and the error is carried over. Without, it is stochastic and needs none; so
        are the differences of "marina", whose sum is to be unbiased.
        """
        config, own, kept = self.config, self.options.compressor, feedback_slots(self.config, self.options)
        if not config.compresses_gradient and own is None:
            return grad.float()
        chance = noise.split(key, noise.GRADIENT) if not kept or "reference" in kept else None

        def compress(wanted: Tensor) -> Tensor:
            if own is None:
                return encode(gradient_codec(config.gradient_bits, config.sparsity), wanted, chance).decode()
            scores = {"importance_scores": self._importance()} if takes_importance(own) else {}
            return own.compress(wanted, config.gradient_bits, config.sparsity, **scores)[0]

        return self._feed_back(grad.float(), compress, key, hyper) if kept else compress(grad.float())

    def _feed_back(self, grad: Tensor, compress: Compress, key: int, hyper: Hyper) -> Tensor:
        """What is applied by the mode of error feedback, `mango.feedback`; stores what the mode keeps."""
        options, kept = self.options, {slot: self.encoded[slot].decode() for slot in FEEDBACK[self.options.error_feedback]}
        if options.momentum_correction:
            momentum = hyper.momentum if self.rule in ("sgd", "muon") else hyper.betas[0]
            fresh = grad if self.rule == "sgd" else grad * (1 - momentum)                # a sum of gradients, or their mean
            velocity = Velocity(self.encoded["velocity"].decode(), kept["residual"])
            applied, velocity = momentum_correction(fresh, velocity, compress, momentum)
            self._store("velocity", velocity.momentum, key)
            self._store("residual", velocity.pending, key)
        elif options.error_feedback == "ef21":
            applied, estimate = ef21(grad, kept["estimate"], compress)
            self._store("estimate", estimate, key)
        elif options.error_feedback == "marina":
            # The residual is kept apart from the reference and taken against it as it was stored: rounding the
            # reference then never reaches the estimate, which is reference - residual.
            before = Reference(kept["reference"] - kept["residual"], kept["reference"])
            applied, _ = marina(grad, before, compress, self.step, options.exact_every)
            self._store("reference", grad, key)
            self._store("residual", self.encoded["reference"].decode() - applied, key)
        else:
            applied, residual = thresholded_feedback(grad, kept["residual"], compress, options.feedback_threshold)
            self._store("residual", residual, key)
        return applied

    def _importance(self) -> Tensor | None:
        """The root mean square of each entry's gradients so far; None before the first, and without a second moment."""
        exp_avg_sq = self.moments()[1]
        return exp_avg_sq.sqrt() if exp_avg_sq is not None and bool(exp_avg_sq.any()) else None

    def hold_gradient(self, grad: Tensor, key: int) -> bool:
        """Add a gradient to the encoded one that is held for the next step. False where that is not finite: nothing is held."""
        codec = gradient_codec(self.config.gradient_bits, self.config.sparsity)
        wanted = grad.float()
        if "held" in self.encoded:
            wanted = wanted + self.encoded["held"].decode()
        fed_back = feedback_slots(self.config, self.options)
        # A gradient that the step would skip, since its norm overflows, must not live on in the residual.
        if not is_finite(wanted) or (fed_back and not math.isfinite(torch.linalg.vector_norm(wanted).square())):
            self.drop_gradient()
            return False
        self.encoded.pop("held", None)                           # the old bytes go before the new ones come
        if not fed_back:
            self.encoded["held"] = encode(codec, wanted, noise.split(key, noise.GRADIENT))
            return True

        def hold(fed: Tensor) -> Tensor:
            self.encoded["held"] = encode(codec, fed)
            return self.encoded["held"].decode()

        threshold = self.options.feedback_threshold
        _, residual = thresholded_feedback(wanted, self.encoded["residual"].decode(), hold, threshold)
        self._store("residual", residual, key)
        return True

    def scale_gradient(self, factor: float, key: int) -> None:
        """Multiply the held gradient, and the error of holding it."""
        for slot in ("held", "residual"):
            if slot in self.encoded:
                self._store(slot, self.encoded[slot].decode() * factor, key)

    def drop_gradient(self) -> None:
        """Forget the held gradient, if there is one, and the residual: what was carried over is part of it by now, and what
        is carried on is the error of a gradient that nobody wants."""
        if self.encoded.pop("held", None) is not None and "residual" in self.encoded:
            self._store("residual", torch.zeros(self.shape, device=self.encoded["residual"].device), None)

    def update(self, param: Tensor, grad: Tensor, hyper: Hyper, key: int) -> tuple[Tensor, Tensor | None]:
        """One step on `param` (float32, in place) with the stored moments; returns the dense moments before storing."""
        self.step += 1
        rule = RULES[self.rule]
        if self.config.rank and (self.step - 1) % REFRESH_EVERY == 0:
            self._refresh(grad, key)
        exp_avg = self._exp_avg()
        exp_avg_sq = self.encoded["exp_avg_sq"].decode() if rule.variance else None
        whole = not self.options.match_lr or self.config.rank or "velocity" in self.encoded  # a direction that lost nothing
        pace = 1.0 if whole else rule.pace(hyper.momentum, self.config.momentum_bits)
        if not self.has_momentum:
            hyper = hyper.without_momentum()
        if hyper.weight_decay and not rule.decoupled:
            grad = grad + hyper.weight_decay * param
        if exp_avg_sq is not None and self.exact:                                   # in place: the decoded tensors are the stored
            adamw_update(param, grad, exp_avg, exp_avg_sq, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps,
                         weight_decay=hyper.weight_decay if rule.decoupled else 0, step=self.step)  # fmt: skip
            return exp_avg, exp_avg_sq
        if self.config.rank:                                                        # AdamW on P^T G (Zhao et al. 2024, alg. 2)
            p = self.encoded["projector"].decode()
            moved = rule.direction(project(p, matricise(grad)), exp_avg, exp_avg_sq, hyper, self.step)
            moved = unmatricise(unproject(p, moved), self.shape)
        else:
            moved = rule.direction(grad, exp_avg, exp_avg_sq, hyper, self.step)
        if hyper.weight_decay and rule.decoupled:
            param.mul_(1 - hyper.lr * hyper.weight_decay)
        param.add_(moved, alpha=-hyper.lr * pace)
        dense = self._outside(exp_avg, exp_avg_sq)
        self._store_moments(exp_avg, exp_avg_sq, key)
        return dense

    @property
    def has_momentum(self) -> bool:
        """Whether the rule advances a first moment. Where momentum was applied to the gradient already, it does not."""
        return self.config.has_momentum and "velocity" not in self.encoded

    @property
    def exact(self) -> bool:
        """Whether both moments are stored in float32."""
        return (self.config.momentum_bits, self.config.variance_bits, self.config.rank) == (32, 32, 0)

    @property
    def chances(self) -> tuple[bool, bool]:
        """Whether the first and the second moment round by chance. At 8 bits and more the first one's increments exceed
        half a bin, and nearest is enough; the second one's never do. Muon's first moment rounds to nearest always:
        chance is noise in all directions, and orthogonalising amplifies the small ones."""
        bits = self.config.factor_bits_q if self.config.rank else self.config.momentum_bits
        return bits < 8 and RULES[self.rule].by_chance, self.config.variance_bits < 32

    def _store_moments(self, exp_avg: Tensor, exp_avg_sq: Tensor | None, key: int) -> None:
        by_chance, _ = self.chances
        if self.config.has_momentum and self.encoded["exp_avg"].codec != "float32":
            self._store("exp_avg", exp_avg, key if by_chance else None)
        if exp_avg_sq is not None and self.encoded["exp_avg_sq"].codec != "float32":
            self._store("exp_avg_sq", exp_avg_sq, key)

    def _refresh(self, grad: Tensor, key: int) -> None:
        """A new projector, with the moments carried over."""
        matrix = matricise(grad)
        old = self.encoded["projector"].decode()
        if not bool(old.any()):                                                     # the first gradient: nothing to carry over
            start = noise.generator(noise.split(key, noise.SKETCH), matrix.device)
            self._store("projector", find(matrix, self.config.rank, start), key)
            return
        new = refresh(matrix, old)
        exp_avg = self.encoded["exp_avg"].decode()
        exp_avg_sq = self.encoded["exp_avg_sq"].decode() if "exp_avg_sq" in self.encoded else torch.zeros_like(exp_avg)
        self._store("projector", new, key)
        exp_avg, exp_avg_sq = transport(exp_avg, exp_avg_sq, new.T @ old)
        self._store("exp_avg", exp_avg, key)
        if "exp_avg_sq" in self.encoded:
            self._store("exp_avg_sq", exp_avg_sq, key)

    def error(self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor | None) -> Tensor:
        """Relative l2 error that storing adds to the direction m / sqrt(v) (m without a second moment), against the dense
        moments of the same step. In a subspace the part of the gradient outside it counts too, added in quadrature."""
        ideal = direction(exp_avg, exp_avg_sq)
        stored, stored_sq = self.moments()
        stored = stored if self.config.has_momentum else exp_avg
        error: Tensor = (direction(stored, stored_sq) - ideal).norm() / safe(ideal.norm())
        if not self.config.rank:
            return error
        p, matrix = self.encoded["projector"].decode(), matricise(grad)
        outside: Tensor = (matrix - unproject(p, project(p, matrix))).norm() / safe(matrix.norm())
        return torch.hypot(error, outside)


def is_finite(x: Tensor) -> bool:
    """Whether all entries are; a norm tells it fast, but overflows before they do."""
    return math.isfinite(torch.linalg.vector_norm(x)) or bool(x.isfinite().all())


def dense_gradient(name: str, gradient: Tensor) -> Tensor:
    """The gradient, if it is dense: TypeError otherwise."""
    if gradient.is_sparse:
        raise TypeError(f"{name} has a sparse gradient; MANGO takes dense ones (Embedding(sparse=False))")
    return gradient


def direction(exp_avg: Tensor, exp_avg_sq: Tensor | None) -> Tensor:
    """m / sqrt(v), zero where v is; m alone where there is no v."""
    if exp_avg_sq is None:
        return exp_avg
    return torch.where(exp_avg_sq > 0, exp_avg / exp_avg_sq.sqrt(), 0.0)
