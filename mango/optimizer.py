"""MANGO: AdamW whose state is stored compressed, layer by layer as a policy decides, inside a hard byte budget."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from mango.accounting import Usage, memory_report, peak_memory, prevailing
from mango.allocation import Allocator, released
from mango.budget import MemoryBudget, parse_budget
from mango.codecs import SIGNED, safe
from mango.config import FULL, LADDER, CompressionConfig, Ladder
from mango.layers import Layer, describe
from mango.loss_track import LossTrack
from mango.policies import Choice, FixedPolicy, Policy, ScoringPolicy, WaterFillingPolicy
from mango.policy_choice import as_policy
from mango.rules import check_hyper, check_positive
from mango.state import Compressor, Hyper, StorageOptions, Target, TensorState, dense_gradient, predicted_bytes
from mango.statistics import Context, GradientStatistics


@dataclass(frozen=True, slots=True)
class Decision:
    """What was seen and what was done at one decision."""

    step: int
    observation: Tensor                      # (L, 64) before deciding
    applied: list[CompressionConfig]         # in force from now on, after the budget had its say
    bytes: Tensor                            # (L,) int64 state bytes under the applied configs
    errors: Tensor                           # (L,) float32 relative error of storing, at the last probe
    loss: float                              # mean since the last decision; nan where no loss was observed


class MANGO(Optimizer):
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
        error_feedback: carry the error of biased gradient compression over to the next step, at `residual_bits`.
        total_steps: length of training, for the policy's sense of progress.
        release_gradients: encode each gradient as backward produces it and drop `p.grad`.
        compressor: an object with `compress(tensor, bits, sparsity_ratio)`, in place of the gradient codecs.
        seed: of the optimizer's own generator (stochastic rounding, sketches).

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
        error_feedback: bool = True,
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
    ) -> None:
        check_positive(policy_update_freq=policy_update_freq, min_numel=min_numel)
        if residual_bits not in SIGNED:
            raise ValueError(f"residual_bits={residual_bits} is not on the menu {tuple(SIGNED)}")
        if policy is not None and policy_net is not None:
            raise ValueError("give policy or policy_net (its older spelling), not both")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_hyper(defaults)
        self.targets: list[Target] = []
        super().__init__(params, defaults)
        self.policy_update_freq, self.total_steps, self.min_numel = policy_update_freq, total_steps, min_numel
        self.options = StorageOptions(error_feedback, residual_bits, release_gradients, compressor)
        self.ladder = released(ladder) if release_gradients else ladder
        self.policy: Policy | ScoringPolicy = as_policy(policy if policy is not None else policy_net, self.ladder)
        self.generator = torch.Generator(self._device()).manual_seed(seed)
        self.steps = 0
        self.skipped = 0
        self._budget_asked = memory_budget
        self._peak_lr = 0.0
        self._clip = 1.0                                                  # factor on held gradients at the next step
        self._broken: set[Target] = set()                                 # whose gradient was not finite, where they are held
        self.losses = LossTrack()
        self.usage = Usage()
        self._decision_hooks: OrderedDict[int, Callable[[Decision], None]] = OrderedDict()  # a plain dict takes no weak reference
        self._gradient_hooks: list[RemovableHandle] = []
        self._set_up()

    def _device(self) -> torch.device:
        first: Tensor | None = next((param for group in self.param_groups for param in group["params"]), None)
        return torch.device("cpu") if first is None else first.device

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
        self._numel: int = sum(target.param.numel() for target in self.targets)
        members = [target for target in self.targets if target.layer is not None]
        self.layers: list[Layer] = describe([t.name for t in members], [tuple(t.param.shape) for t in members])
        self.statistics = GradientStatistics(self.layers, self._device())
        small = sum(predicted_bytes(tuple(t.param.shape), FULL, self.options) for t in self.targets if t.layer is None)
        total = parse_budget(self._budget_asked, self.adamw_bytes, self._device())
        self.budget = MemoryBudget(total, small + self.statistics.nbytes)
        self.allocator = Allocator(self.layers, self.ladder, self.options, self.budget)
        self.applied: list[CompressionConfig] = [known.get(t.param, getattr(self.policy, "initial", FULL)) for t in members]
        if not known:
            self.applied = self._initial()
        elif not self.allocator.fits(self.applied):
            self.apply(self.applied)
        if self.options.release_gradients:
            self._hook_gradients()

    def _list_targets(self) -> Iterable[Target]:
        layers = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group{number}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                is_layer = param.numel() >= self.min_numel
                yield Target(name, param, group, layers if is_layer else None)
                layers += is_layer

    def _initial(self) -> list[CompressionConfig]:
        asked = getattr(self.policy, "initial", FULL)
        wanted = [asked] * len(self.layers)
        needed = sum(self.allocator.nbytes(wanted))
        if needed <= self.budget.available:
            return wanted
        if isinstance(self.policy, FixedPolicy):
            raise ValueError(
                f"fixed config {asked.name!r} needs {needed + self.budget.fixed:,} bytes, more than the memory_budget of"
                f" {self.budget.total:,}; choose a smaller config or policy=None (water-filling)"
            )
        scores = WaterFillingPolicy(ladder=self.ladder).scores(self.observe(wanted))
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
        for target in self.targets:
            gradient = self.compress_gradient(target)
            if gradient is not None:
                self.update_parameter(target, gradient)
        self._clip = 1.0
        self.statistics.observe()
        self.usage.count(self.layers, self.applied, self.adamw_bytes / max(1, self.planned_bytes()))
        if self.steps % self.policy_update_freq == 0:
            self.statistics.finish_probe(self.generator)
            self._decide()
        self.losses.next_step()
        return loss

    def compress_gradient(self, target: Target) -> Tensor | None:
        """The gradient to apply (float32), as its codec gives it back; None where there is none or it is not finite."""
        raw = target.param.grad
        state = self._state(target) if raw is not None or self.options.release_gradients else None
        if state is None:
            return None
        if self.options.release_gradients:
            if raw is not None:                                              # set by hand, or unfrozen after the hooks were made
                self._hold(target)
            held = state.encoded.pop("held", None)
            if target in self._broken:
                self._broken.discard(target)
                self.skipped += 1
                return None
            if held is None:
                return None
            gradient = held.decode() * self._clip
        elif raw is not None:
            gradient = dense_gradient(target.name, raw)
        norm = torch.linalg.vector_norm(gradient.float())
        if not math.isfinite(norm):
            self.skipped += 1
            return None
        if target.layer is not None:
            self.statistics.take(target.layer, gradient, norm)
        if target.group["maximize"]:
            gradient = -gradient
        return gradient if self.options.release_gradients else state.compress_gradient(gradient, self.generator)

    def update_parameter(self, target: Target, gradient: Tensor) -> None:
        """Advance the stored moments by a gradient (float32) and move the parameter."""
        group, state = target.group, self._state(target)
        hyper = Hyper(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        due = self.steps % self.policy_update_freq
        measure = target.layer is not None and due in (0, self.policy_update_freq - 1)
        full = target.param.dtype in (torch.float32, torch.float64)              # updated in place, else through a float32 copy
        dense = target.param.detach() if full else target.param.detach().float()
        before = dense.clone() if measure else None
        moments = state.update(dense, gradient, hyper, self.generator)
        if dense.dtype != target.param.dtype:
            target.param.detach().copy_(dense)
        if before is None or target.layer is None:
            return
        moved = (dense - before).norm()
        if due == 0:
            raw = target.param.grad
            signed = -raw if raw is not None and group["maximize"] else raw
            self._probe(target.layer, state, signed, gradient, moments, dense, moved)
        self.statistics.moved[target.layer] = moved

    def _probe(
        self, layer: int, state: TensorState, raw: Tensor | None, gradient: Tensor, moments: tuple[Tensor, Tensor],
        param: Tensor, moved: Tensor,
    ) -> None:  # fmt: skip
        """Hand the statistics what they need of a layer's dense tensors; `raw` is the gradient before compression."""
        error = state.error(gradient, *moments)
        if raw is not None and state.config.compresses_gradient:
            error = torch.hypot(error, (raw.float() - gradient).norm() / safe(raw.float().norm()))
        residual = state.encoded["residual"].decode().norm() if "residual" in state.encoded else gradient.new_zeros(())
        self.statistics.probe(
            layer, state.config, grad=gradient, exp_avg=moments[0], exp_avg_sq=moments[1], param=param, moved=moved,
            error=error, residual_norm=residual, loss_change=self.losses.change,
        )  # fmt: skip

    def _state(self, target: Target) -> TensorState:
        """The tensor's state, made when its first gradient comes."""
        slot = self.state[target.param]
        if "tensor" not in slot:
            config = FULL if target.layer is None else self.applied[target.layer]
            slot["tensor"] = TensorState(tuple(target.param.shape), config, self.options)
            slot["tensor"].create(target.param.device)
        state: TensorState = slot["tensor"]
        return state

    def _hook_gradients(self) -> None:
        for handle in self._gradient_hooks:
            handle.remove()

        def hold(target: Target) -> Callable[[Tensor], None]:
            return lambda param: self._hold(target)

        hooked = [t for t in self.targets if t.param.requires_grad]
        self._gradient_hooks = [t.param.register_post_accumulate_grad_hook(hold(t)) for t in hooked]  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _hold(self, target: Target) -> None:
        """Encode the parameter's gradient for the next step and drop it."""
        if target.param.grad is None:
            return
        gradient = dense_gradient(target.name, target.param.grad)
        if math.isfinite(torch.linalg.vector_norm(gradient.float())):
            self._state(target).hold_gradient(gradient, self.generator)
        else:
            self._broken.add(target)
        target.param.grad = None

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global l2 norm is at most `max_norm`; returns the norm before. Works on held ones."""
        if self.options.release_gradients:
            states = [slot["tensor"] for slot in self.state.values()]
            held = [s.encoded["held"].decode() for s in states if "held" in s.encoded]
            norm = torch.stack([g.norm() for g in held]).norm() * self._clip if held else torch.zeros(())
            self._clip *= min(1.0, max_norm / (float(norm) + 1e-6))
            return norm
        return torch.nn.utils.clip_grad_norm_([t.param for t in self.targets], max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; drops held gradients too."""
        super().zero_grad(set_to_none)
        if hasattr(self, "options") and self.options.release_gradients:
            self._broken.clear()
            self._clip = 1.0
            for slot in self.state.values():
                slot["tensor"].encoded.pop("held", None)

    def observe_loss(self, loss: float | Tensor) -> None:
        """Tell the loss at the current parameters, before `step` (which does it itself when given a closure)."""
        self.losses.observe(loss)

    def observe(self, configs: Sequence[CompressionConfig] | None = None) -> Tensor:
        """The current observation (L, 64) float32, on the CPU, each value within its range in `mango.features.FEATURES`."""
        configs = self.applied if configs is None else configs
        lr = float(self.param_groups[0]["lr"])
        peak = max(self._peak_lr, lr)
        used = self.allocator.nbytes(configs)
        return self.statistics.features(Context(
            configs, used, self._numel, sum(used) + self.budget.fixed, self.budget.total,
            price=self.budget.price,
            progress=self.steps / self.total_steps if self.total_steps else 0.0,
            loss=self.losses.mean, loss_slope=self.losses.slope,
            lr=lr, lr_ratio=lr / peak if peak else 1.0, peak_memory=self._peak_memory(),
        ))  # fmt: skip

    collect_features = observe

    def _peak_memory(self) -> float:
        device = self._device()
        if device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory

    def _decide(self) -> None:
        mean = self.losses.close_interval()
        observation = self.observe()
        self._peak_lr = max(self._peak_lr, float(self.param_groups[0]["lr"]))
        if self.layers:
            scoring = isinstance(self.policy, ScoringPolicy)
            self.apply(self.policy.scores(observation) if scoring else self.policy.act(observation))  # type: ignore[union-attr]
        decision = Decision(self.steps, observation, list(self.applied), self.layer_bytes(), self.layer_errors(), mean)
        for hook in list(self._decision_hooks.values()):
            hook(decision)

    def register_decision_hook(self, hook: Callable[[Decision], None]) -> RemovableHandle:
        """Call `hook(decision)` after every decision; `.remove()` on what is returned ends it."""
        handle = RemovableHandle(self._decision_hooks)
        self._decision_hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def apply(self, choice: Choice) -> list[CompressionConfig]:
        """Cut a choice to the budget, put it in force and return what was applied, one config per layer.

        `choice`: rung scores (L, R) float, knob indices (L, K) int, a config per layer, one config or dict for all, or
        None for no change. What shrinks is transcoded first, so stored bytes never exceed the budget on the way.
        """
        wanted = self.allocator.resolve(choice, self.applied, self.observe)
        self.usage.changes += sum(old != new for old, new in zip(self.applied, wanted, strict=True))
        now = self.allocator.nbytes(self.applied)
        after = self.allocator.nbytes(wanted)
        members = [target for target in self.targets if target.layer is not None]
        self.applied = wanted
        for i in sorted(range(len(members)), key=lambda i: after[i] - now[i]):
            slot = self.state.get(members[i].param)
            if slot and slot["tensor"].config != wanted[i]:
                slot["tensor"].transcode(wanted[i], self.generator)
        return list(wanted)

    @property
    def memory_budget(self) -> int:
        """Bytes that all stored state may take."""
        return self.budget.total

    @property
    def adamw_bytes(self) -> int:
        """What AdamW's two float32 moments would take: 8 bytes per parameter."""
        return 8 * self._numel

    def planned_bytes(self) -> int:
        """Bytes under the configs in force once every tensor has seen a gradient; `state_bytes` never exceeds it."""
        return sum(self.allocator.nbytes(self.applied)) + self.budget.fixed

    def layer_bytes(self) -> Tensor:
        """State bytes of each layer under the configs in force: (L,) int64."""
        return torch.tensor(self.allocator.nbytes(self.applied), dtype=torch.int64)

    def layer_errors(self) -> Tensor:
        """Relative error that storing added to each layer's update at the last probe: (L,) float32."""
        return self.statistics.compression_errors()

    def state_bytes(self) -> int:
        """Bytes of every tensor that the optimizer keeps, measured on their storages."""
        states: Iterable[TensorState] = (slot["tensor"] for slot in self.state.values())
        return self.statistics.nbytes + sum(state.nbytes for state in states)

    def memory_report(self) -> dict[str, Any]:
        """Bytes by component, their `total`, the `budget`, what AdamW would take, and the same per layer."""
        names = [(target.name, target.layer) for target in self.targets]
        states = [self.state.get(target.param, {}).get("tensor") for target in self.targets]
        report = memory_report(names, states, self.layers, self.applied, self.statistics.nbytes)
        return report | {"budget": self.memory_budget, "adamw": self.adamw_bytes}

    def get_compression_stats(self) -> dict[str, float]:
        """Averages over all steps so far, layers weighted by size: compression ratio, bits, sparsity; number of changes."""
        return self.usage.averages()

    def get_memory_usage(self) -> dict[str, float]:
        """Peak device memory (on a CPU: of the process) and stored state, in GB (10^9 bytes)."""
        return {
            "peak_memory_gb": peak_memory(self._device()) / 1e9,
            "state_gb": self.state_bytes() / 1e9,
            "budget_gb": self.memory_budget / 1e9,
        }

    def collect_gradient_features(self) -> dict[str, Tensor]:
        """The observation as a dict, for policies that take one: {"layers": (L, 64)}."""
        return {"layers": self.observe()}

    def get_compression_config(self) -> dict[str, Any]:
        """The config in force on most parameters, as the three knobs of the earlier public interface."""
        return prevailing(self.layers, self.applied)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and JSON-able scalars: `torch.load(weights_only=True)` reads it, and resuming is bit-exact."""
        saved = super().state_dict()
        saved["state"] = {i: state["tensor"].to_plain() for i, state in saved["state"].items()}
        inner = getattr(self.policy, "state_dict", None)
        saved["mango"] = {
            "steps": self.steps, "skipped": self.skipped, "peak_lr": self._peak_lr, "usage": asdict(self.usage),
            "price": self.budget.price, "budget": self.memory_budget, "losses": self.losses.state_dict(),
            "applied": [config.to_dict() for config in self.applied],
            "statistics": self.statistics.state_dict(), "generator": self.generator.get_state(),
            "policy": inner() if inner is not None else None,
        }  # fmt: skip
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, codes as they are. A state that exceeds this optimizer's budget is cut to it."""
        if "mango" not in state_dict:
            raise ValueError(f"this state dict is not MANGO's: it has {sorted(state_dict)}, and no 'mango'")
        mine = state_dict["mango"]
        if len(mine["applied"]) != len(self.layers):
            raise ValueError(f"the state dict has {len(mine['applied'])} layers, this optimizer {len(self.layers)}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for group, target in zip([g for g in self.param_groups for _ in g["params"]], self.targets, strict=True):
            target.group = group
        self.applied = [CompressionConfig.from_dict(config) for config in mine["applied"]]
        for i, flat in state_dict["state"].items():
            target = self.targets[int(i)]
            if tuple(flat["shape"]) != tuple(target.param.shape):
                saved, own = tuple(flat["shape"]), tuple(target.param.shape)
                raise ValueError(f"{target.name} has shape {own}; the state saved for it is of shape {saved}")
            state = TensorState.from_plain(flat, self.options, target.param.device)
            state.transcode(state.config, self.generator)                    # nothing to do unless the options differ
            self.state[target.param]["tensor"] = state
        self._restore(mine)
        if not self.allocator.fits(self.applied):
            self.apply(self.applied)

    def _restore(self, mine: Mapping[str, Any]) -> None:
        self.steps, self.skipped, self._peak_lr = mine["steps"], mine["skipped"], mine["peak_lr"]
        self.usage, self.budget.price = Usage(**mine["usage"]), mine["price"]
        self.losses.load_state_dict(mine["losses"])
        if self._budget_asked is None:                                  # a share of what was free then, not of what is free now
            self.budget.total = mine["budget"]
        self.statistics.load_state_dict(mine["statistics"])
        self.generator.set_state(mine["generator"].cpu())
        inner = getattr(self.policy, "load_state_dict", None)
        if inner is not None and mine["policy"] is not None:
            inner(mine["policy"])

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_gradient_hooks", "_decision_hooks", "step")           # a scheduler shadows `step` with one bound to this object
        return {key: value for key, value in self.__dict__.items() if key not in mine and not key.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "targets" in state:                                          # a pickle or a copy, not torch's load_state_dict
            self._decision_hooks, self._gradient_hooks = OrderedDict(), []
            if self.options.release_gradients:
                self._hook_gradients()
