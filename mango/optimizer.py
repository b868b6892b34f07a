"""MANGO: AdamW whose state is stored compressed, layer by layer as a policy decides, inside a hard byte budget."""

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from mango import checkpoint, master, native, noise
from mango.accounting import MeanBits, PeakMemory, Usage
from mango.allocation import Allocator, released
from mango.codecs import safe
from mango.config import FULL, LADDER, CompressionConfig, Ladder
from mango.fused import FusedUpdate, Work
from mango.fused_cuda import DeviceMoves, FusedUpdateCUDA
from mango.layers import Layer, describe
from mango.loss_track import LossTrack
from mango.master import MASTER_BITS, correction_bytes, new_correction
from mango.memory import Budgeted
from mango.paging import Pager, Staged
from mango.policies import Choice, HoldPolicy, Policy, ScoringPolicy, WaterFillingPolicy
from mango.policy_choice import as_policy
from mango.probing import Window, probe_dense, probe_fused, window_of
from mango.ranks import Ranks, clip_grad_norm
from mango.release import HeldGradients
from mango.rules import Hyper, check_hyper, check_positive, rule_for
from mango.state import Compressor, StorageOptions, Target, TensorState, dense_gradient, predicted_bytes
from mango.statistics import Context, GradientStatistics

_NO_ERROR = torch.zeros(())


@dataclass(frozen=True, slots=True)
class Decision:
    """What was seen and what was done at one decision."""

    step: int
    observation: Tensor                      # (L, 64) before deciding
    applied: list[CompressionConfig]         # in force from now on, after the budget had its say
    bytes: Tensor                            # (L,) int64 state bytes under the applied configs
    errors: Tensor                           # (L,) float32 relative error of storing, at the last probe
    loss: float                              # mean since the last decision; nan where no loss was observed


class MANGO(Budgeted):
    """AdamW with compressed state under a byte budget. At full precision it is torch.optim.AdamW.

    Every tensor of `min_numel` entries or more is a layer with its own `CompressionConfig`; smaller ones stay at full
    precision. The policy is asked every `policy_update_freq` steps; what it answers is cut to the budget, applied, and
    stays in force. Before the first answer all is at full precision where the budget allows it.

    Args:
        params: tensors, groups, or `model.named_parameters()` (names tell layer kinds).
        memory_budget: bytes (int), "6GiB", a fraction of AdamW's 8 bytes per parameter (float), or None: half of the
            free memory. Holds for all that is stored, after every call and while configs change.
        policy: a shipped name, a path to a frozen policy, a name in `mango.policies.POLICIES`, a `CompressionConfig`,
            a dict of knobs, or an object with `act(obs)` or `scores(obs)`. None: water-filling.
        policy_net: the older spelling of `policy`.
        error_feedback: carry the error of biased gradient compression over to the next step, at `residual_bits`. "ef21",
            "marina": apply an estimate that moves by compressed differences; the latter is exact every `exact_every` steps.
        feedback_threshold: feed the error back only while its norm is at least so many times the gradient's; inf: never.
        momentum_correction: apply momentum before the gradient is compressed, none after it (for sparse gradients).
        rule: "adamw", "adam", "sgd" (with momentum), "lion", or "muon" (hidden matrices; AdamW moves the rest). A group may
            have its own.
        momentum: of "sgd" and "muon"; None: 0.9.
        matrix_lr_scale: of Muon's matrices, whose learning rate is `lr` times this: updates are of AdamW's size at 1.
        match_lr: Muon's matrices whose first moment is stored in 2 bits or not at all move at 1.2 or 1.9 times the rate (at
            momentum 0.9), to get about as far as they do in full precision: `mango.rules.muon_pace`.
        master_bits: of bfloat16 parameters. 16: rounded by chance; 24, 32: with a correction of 8 or 16 bits beside them.
        page_to: where state goes that exceeds `memory_budget`: a folder (as a mapped file without a name), or "pinned" (host
            memory, with parameters on a CUDA device). The biggest layers go first. None: nowhere, it is compressed to fit.
        page_budget: how much may go there, as `memory_budget` (None: any amount).
        total_steps: length of training, for the policy's sense of progress.
        release_gradients: encode each gradient as backward produces it and drop `p.grad`.
        compressor: an object with `compress(tensor, bits, sparsity_ratio)`, in place of the gradient codecs.
        seed: of stochastic rounding and sketches.
        strict: raise where otherwise a warning says what goes on without: no compiler for the kernels, a failing policy.
        shard: under DDP: each tensor's state lives on one rank, which moves the parameter and sends it to the others.
        process_group: of the ranks that train this model together and build this optimizer alike; None: the DTensors' mesh
            (FSDP2), or all of torch.distributed; False: this process alone. Decisions are theirs in common; a budget is
            each rank's own (as a fraction: of AdamW's bytes on the fullest rank).

    Raises:
        ValueError: hyper-parameters out of range, an impossible budget (names the least feasible bytes).
        TypeError: sparse gradients, complex parameters.

    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = MANGO(model.named_parameters(), lr=1e-2, memory_budget=0.5)
    >>> model(torch.ones(1, 64)).sum().backward(); optimizer.step()
    >>> optimizer.state_bytes() <= optimizer.memory_budget
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        memory_budget: int | float | str | None = None,
        policy_net: Any = None,
        error_feedback: bool | str = True,
        policy_update_freq: int = 100,
        *,
        policy: Any = None,
        total_steps: int | None = None,
        min_numel: int = 1024,
        ladder: Ladder = LADDER,
        residual_bits: int = 8,
        release_gradients: bool = False,
        compressor: Compressor | None = None,
        seed: int = 0,
        maximize: bool = False,
        rule: str = "adamw",
        momentum: float | None = None,
        matrix_lr_scale: float = 1.0,
        master_bits: int = 16,
        page_to: str | Path | None = None,
        page_budget: int | float | str | None = None,
        strict: bool = False,
        shard: Any = False,
        process_group: Any = None,
        feedback_threshold: float = 0.0,
        momentum_correction: bool = False,
        exact_every: int = 10,
        match_lr: bool = True,
    ) -> None:
        check_positive(policy_update_freq=policy_update_freq, min_numel=min_numel)
        if master_bits not in MASTER_BITS:
            raise ValueError(f"master_bits={master_bits!r} is not on the menu {tuple(MASTER_BITS)}")
        if policy is not None and policy_net is not None:
            raise ValueError("give policy or policy_net (its older spelling), not both")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
                    "rule": rule, "momentum": momentum, "matrix_lr_scale": matrix_lr_scale}  # fmt: skip
        check_hyper(defaults)
        self.targets: list[Target] = []
        super().__init__(params, defaults)
        self.policy_update_freq, self.total_steps, self.min_numel = policy_update_freq, total_steps, min_numel
        modes = (feedback_threshold, momentum_correction, exact_every, match_lr)
        self.options = StorageOptions(error_feedback, residual_bits, release_gradients, compressor, *modes)
        self.seed, self.master_bits, self.strict = seed, master_bits, strict
        if strict and self._device().type == "cpu":
            native.load(strict=True)
        self.ladder = released(ladder) if release_gradients else ladder
        self.policy: Policy | ScoringPolicy = as_policy(policy if policy is not None else policy_net, self.ladder)
        self.steps, self.skipped, self._policy_failed = 0, 0, False
        self.seconds_deciding = 0.0                                         # of all steps so far, in this process
        self.budget_asked, self.page_budget_asked, self.peak_lr = memory_budget, page_budget, 0.0
        if page_budget is not None and page_to is None:
            raise ValueError("page_budget says how much may be paged; say where to with page_to")
        self.pager, self.peak = Pager(page_to, self._device()), PeakMemory(self._device())
        self.held = HeldGradients(self._state, self.key_of) if release_gradients else None
        self.losses, self.usage = LossTrack(), Usage()
        self._counted: list[CompressionConfig] | None = None                # the configs that `_to_count` is of
        self._decision_hooks: OrderedDict[int, Callable[[Decision], None]] = OrderedDict()  # a plain dict takes no weak reference
        self.ranks = Ranks.of([p for g in self.param_groups for p in g["params"]], process_group, shard)
        self._set_up()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Layers are counted anew, so statistics start over; states and their configs stay."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_hyper(group)
        for param in group["params"]:
            if param.is_complex():
                raise TypeError("complex parameters are not supported; pass torch.view_as_real(parameter)")
        if hasattr(self, "options"):
            self._set_up()

    def _set_up(self) -> None:
        """(Re)count targets and layers, fix the budget, and choose configs for layers that have none."""
        known = {target.param: self.applied[target.layer] for target in self.targets if target.layer is not None}
        self.targets = list(self._list_targets())
        members = [target for target in self.targets if target.layer is not None]
        self.layers: list[Layer] = describe(
            [t.name for t in members], [tuple(t.param.shape) for t in members], [t.group["rule"] for t in members]
        )
        for target, layer in zip(members, self.layers, strict=True):
            target.rule = layer.rule
        self.ranks.place(self.targets, self.held is not None)
        self._numel = self.ranks.largest_numel()
        self._places = {target: i for i, target in enumerate(self.targets)}
        self.statistics = GradientStatistics(self.layers, self._device(), [t.shape_here for t in members])
        self.new_fused()
        kept = [(t, t.planned) for t in self.targets if t.planned is not None]
        small = sum(predicted_bytes(shape, FULL, self.options, t.rule) for t, shape in kept if t.layer is None)
        small += sum(correction_bytes(t.param, shape, self.master_bits) for t, shape in kept)
        self.budget = self._new_budget(small + self.statistics.nbytes)
        self.allocator = Allocator(self.layers, self.ladder, self.options, self.budget, [t.planned for t in members], self.pager)
        self.applied: list[CompressionConfig] = [known.get(t.param, getattr(self.policy, "initial", FULL)) for t in members]
        if not known:
            self.applied = self.ranks.agree(self._initial())
        elif not self.ranks.all(self.allocator.fits(self.applied)):
            self.apply(self.applied)
        self.place_layers()
        if self.held is not None:
            self.held.watch(self.targets)

    def new_fused(self) -> None:
        """Forget the addresses of stored tensors: others are in their places."""
        self.fused: FusedUpdate | FusedUpdateCUDA
        if self._device().type == "cuda":
            self.fused = FusedUpdateCUDA(self.targets, self.statistics, self.seed, self.strict)
        else:
            self.fused = FusedUpdate(self.targets, self.statistics, self.seed)

    def _list_targets(self) -> Iterable[Target]:
        layers = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group{number}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                is_layer = param.numel() >= self.min_numel
                small = rule_for(group["rule"], (), "norm")
                yield Target(name, param, group, group["rule"] if is_layer else small, layers if is_layer else None)
                layers += is_layer

    def _initial(self) -> list[CompressionConfig]:
        asked = getattr(self.policy, "initial", FULL)
        wanted = [asked] * len(self.layers)
        if self.allocator.fits(wanted):
            return wanted
        self.check_fixed(wanted)
        observation = self.observe(wanted)
        scores = self._ask(observation) if isinstance(self.policy, ScoringPolicy) else None
        if scores is None:
            scores = WaterFillingPolicy(ladder=self.ladder).scores(observation)
        return self.allocator.resolve(scores, wanted, self.observe)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; on every `policy_update_freq`-th step, a decision."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None:
                self.observe_loss(loss)
        if self.steps % self.policy_update_freq == 0:
            self.statistics.start_window()
        self.steps += 1
        self.ranks.average(self.losses, self.steps, self.policy_update_freq)
        for batch in [self.targets] if self.held is None else self.held.in_turn():
            self.update_parameters(self.compress_gradients(batch))
        self.ranks.share()
        self.statistics.observe()
        if self._counted is not self.applied:
            self._counted, ratio = self.applied, self.adamw_bytes / max(1, self.planned_bytes())
            self._to_count = (MeanBits.of(self.layers, self.applied), ratio)
        self.usage.count(*self._to_count)
        if self.steps % self.policy_update_freq == 0:
            began = time.perf_counter()
            self.statistics.finish_probe(noise.step_key(self.seed, len(self.targets), self.steps))
            self._decide()
            self.seconds_deciding += time.perf_counter() - began
        self.losses.next_step()
        return loss

    def compress_gradients(self, targets: Sequence[Target] | None = None) -> list[Work]:
        """The gradients to apply, as their codecs give them back; those that are not there or not finite are left out."""
        work = [self.compress_gradient(target) for target in (self.targets if targets is None else targets)]
        return [update for update in work if update is not None]

    def compress_gradient(self, target: Target) -> Work | None:
        """One tensor's gradient as its codec gives it back; None where there is none or it is not finite."""
        gradient = target.grad if target.mine else None
        if self.held is not None:
            gradient, finite = self.held.take(target)
            self.skipped += not finite
        if gradient is None:
            return None
        gradient = dense_gradient(target.name, gradient)
        state = self._state(target)
        coded = self.held is None and (state.config.compresses_gradient or self.options.compressor is not None)
        if not coded and self._fusable(target, state, gradient):
            return Work(target, state, gradient, True, _NO_ERROR)
        norm = torch.linalg.vector_norm(gradient.float())
        if not math.isfinite(norm.square()):                            # what its second moment could not hold neither
            self.skipped += 1
            return None
        if target.layer is not None:
            self.statistics.take(target.layer, gradient, norm)
        if not coded:
            return Work(target, state, gradient.float(), False, _NO_ERROR)
        applied = state.compress_gradient(gradient, self.key_of(target), Hyper.of(target.group, state.rule))
        return Work(target, state, applied, False, (gradient.float() - applied).norm() / safe(norm.float()))

    def update_parameters(self, work: Sequence[Work]) -> None:
        """Advance the stored moments by the gradients and move the parameters."""
        due = self.steps % self.policy_update_freq
        measure = due in (0, self.policy_update_freq - 1)
        fused: list[Work] = []
        alone: list[Work] = []
        for w in work:
            (fused if w.fresh or self._fusable(w.target, w.state, w.gradient) else alone).append(w)
        windows = {w.target: window_of(w.state) for w in (fused if due == 0 else ()) if w.target.layer is not None}
        if fused:
            self._update_fused(fused, windows, measure)
        for i, w in enumerate(alone):
            self.pager.prefetch([following.state for following in alone[i + 1 : i + 2]])
            self.update_parameter(w, measure, probe=due == 0)
        self.pager.settle()

    def _fusable(self, target: Target, state: TensorState, gradient: Tensor) -> bool:
        """Whether the kernels can do it, in one launch with others; what is paged out comes by turns."""
        return not isinstance(state.encoded, Staged) and self.fused.covers(target, state) and self.fused.accepts(gradient)

    def _update_fused(self, work: Sequence[Work], windows: Mapping[Target, Window], measure: bool) -> None:
        found = self.fused.run(work, self.steps, measure)
        if isinstance(found, DeviceMoves) and not windows:                  # it stays on the device until there is a decision
            return
        moves = found.on_host()
        self.skipped += self.fused.settle()
        for i, (target, state, gradient, _, coding) in enumerate(work if measure else ()):
            if target.layer is None or not moves.finite[i]:
                continue
            moved = float(moves.moved[i])
            if target in windows:
                signed = -gradient if target.group["maximize"] else gradient
                probe_fused(
                    self.statistics, target.layer, state, windows[target], signed, Hyper.of(target.group, state.rule),
                    param_norm=float(moves.param_norm[i]), moved=moved, alignment=float(moves.alignment[i]), coding=coding,
                    loss_change=self.losses.change,
                )  # fmt: skip
            self.statistics.moved[target.layer] = moved

    def update_parameter(self, work: Work, measure: bool = False, probe: bool = False) -> None:
        """One tensor's update in PyTorch: on any device, of any dtype, by any rule."""
        target, state, gradient, _, coding = work
        gradient = -gradient if target.group["maximize"] else gradient
        dense = master.join(target.local, state.correction)
        before = dense.clone() if measure and target.layer is not None else None
        moments = state.update(dense, gradient, Hyper.of(target.group, state.rule), self.key_of(target))
        master.store(dense, target.local, state.correction, self.key_of(target))
        if before is None or target.layer is None:
            return
        moved = (dense - before).norm()
        if probe:
            probe_dense(self.statistics, target.layer, state, moments, gradient, dense, moved=moved, coding=coding,
                        loss_change=self.losses.change)  # fmt: skip
        self.statistics.moved[target.layer] = moved

    def key_of(self, target: Target) -> int:
        """The key of the tensor's noise at this step."""
        return noise.step_key(self.seed, self._places[target], self.steps)

    def _state(self, target: Target) -> TensorState:
        """The tensor's state, made when its first gradient comes."""
        known: TensorState | None = self.state.get(target.param, {}).get("tensor")
        if known is not None:
            return known
        config = FULL if target.layer is None else self.applied[target.layer]
        state = TensorState(tuple(target.local.shape), config, self.options, target.rule)
        self.pager.adopt(state, target.layer)
        state.create(target.local.device)
        state.correction = new_correction(target.local, self.master_bits)
        self.state[target.param]["tensor"] = state
        return state

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global l2 norm is at most `max_norm`; returns the norm before. Works on held ones."""
        if self.held is not None:
            return self.held.clip(max_norm)
        return clip_grad_norm(self.targets, max_norm)

    def observe_loss(self, loss: float | Tensor) -> None:
        """Tell the loss at the current parameters, before `step` (which does it itself when given a closure)."""
        self.losses.observe(loss)

    def observe(self, configs: Sequence[CompressionConfig] | None = None, summary: Tensor | None = None) -> Tensor:
        """The current observation (L, 64) float32, on the CPU, each value within its range in `mango.features.FEATURES`."""
        configs = self.applied if configs is None else configs
        lr = float(self.param_groups[0]["lr"])
        peak = max(self.peak_lr, lr)
        used = self.allocator.nbytes(configs)
        return self.statistics.features(Context(
            configs, used, self._numel, sum(used) + self.budget.fixed, self.budget.room,
            price=self.budget.price,
            progress=self.steps / self.total_steps if self.total_steps else 0.0,
            loss=self.losses.mean, loss_slope=self.losses.slope,
            lr=lr, lr_ratio=lr / peak if peak else 1.0, peak_memory=self.peak.share(),
        ), summary)  # fmt: skip

    collect_features = observe

    def _decide(self) -> None:
        mean = self.losses.close_interval()
        if type(self.policy) is HoldPolicy and not self._decision_hooks and self.ranks.group is None:
            self.peak_lr = max(self.peak_lr, float(self.param_groups[0]["lr"]))  # nobody looks: decided from outside
            self.peak.start_interval()
            return
        observation = self.ranks.rows(self.observe(summary=self.ranks.merge(self.statistics)))
        self.peak_lr = max(self.peak_lr, float(self.param_groups[0]["lr"]))
        self.peak.start_interval()
        if self.layers:
            self.apply(self._ask(observation), observation)
        decision = Decision(self.steps, observation, list(self.applied), self.layer_bytes(), self.layer_errors(), mean)
        for hook in list(self._decision_hooks.values()):
            hook(decision)

    def _ask(self, observation: Tensor) -> Choice:
        """The policy's answer; None (no change) where it fails, with one warning."""
        try:
            return self.policy.scores(observation) if isinstance(self.policy, ScoringPolicy) else self.policy.act(observation)
        except Exception as error:
            if self.strict:
                raise
            if not self._policy_failed:
                self._policy_failed = True
                warnings.warn(f"the policy failed, its last decision stays: {type(error).__name__}: {error}", stacklevel=4)
            return None

    def register_decision_hook(self, hook: Callable[[Decision], None]) -> RemovableHandle:
        """Call `hook(decision)` after every decision; `.remove()` on what is returned ends it."""
        handle = RemovableHandle(self._decision_hooks)
        self._decision_hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def apply(self, choice: Choice, observation: Tensor | None = None) -> list[CompressionConfig]:
        """Cut a choice to the budget, put it in force and return what was applied, one config per layer.

        `choice`: rung scores (L, R) float, knob indices (L, K) int, a config per layer, one config or dict for all, or
        None for no change. What shrinks is transcoded first, so stored bytes never exceed the budget on the way.
        """
        seen = self.observe if observation is None else lambda: observation
        wanted = self.ranks.agree(self.allocator.resolve(choice, self.applied, seen))
        now = self.allocator.nbytes(self.applied)
        after = self.allocator.nbytes(wanted)
        members = [target for target in self.targets if target.layer is not None]
        states = self.kept_layers()
        with self.pager.moved(after, self.budget.total - self.budget.fixed, states):
            self.usage.changes += sum(old != new for old, new in zip(self.applied, wanted, strict=True))
            self.applied = wanted
            for i in sorted(range(len(members)), key=lambda i: after[i] - now[i]):
                state = states[i]
                if state is not None and state.config != wanted[i]:
                    state.transcode(wanted[i], self.key_of(members[i]))
        return list(wanted)

    def collect_gradient_features(self) -> dict[str, Tensor]:
        """The observation as a dict, for policies that take one: {"layers": (L, 64)}."""
        return {"layers": self.observe()}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and JSON-able scalars: `torch.load(weights_only=True)` reads it, and resuming is bit-exact."""
        return checkpoint.save(self, super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, codes as they are. A state that exceeds this optimizer's budget is cut to it."""
        state_dict = checkpoint.check(self, state_dict)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        checkpoint.restore(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_decision_hooks", "step")           # a scheduler shadows `step` with one bound to this object
        return {key: value for key, value in self.__dict__.items() if key not in mine and not key.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "targets" in state:                                          # a pickle or a copy, not torch's load_state_dict
            self._decision_hooks = OrderedDict()
            self.new_fused()                                            # addresses are of another object's tensors
            if self.held is not None:
                self.held.watch(self.targets)
