"""Recording: episodes of a `TrainingRun`, of somebody's own training loop, and gradient statistics as CSV.

All three log what was *applied* and what was *measured*; rewards come from the same `Reward`, and its unweighted terms
are logged, so that they can be recomputed.
"""

import csv
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

import mango
from mango.config import LADDER, CompressionConfig, Ladder
from mango.features import FEATURES
from mango.layers import Layer
from mango.optimizer import MANGO, Decision
from mango.policies import POLICIES, ScoringPolicy
from mango_env.batched_run import BatchedRuns
from mango_env.episode import Episode
from mango_env.interrupts import interrupts_held
from mango_env.reward import Reward, RewardTerms
from mango_env.run import Interval, TrainingRun, whole_number
from mango_env.store import TrajectoryWriter
from mango_env.twin import Twin, score, twin_of

Attributes = dict[str, str | int | float | bool]


class Track:
    """The decisions of one run as they come, one episode per layer when it ends."""

    def __init__(self, layers: Sequence[Layer], ladder: Ladder = LADDER) -> None:
        self.layers, self.ladder = list(layers), ladder
        self._observations: list[NDArray[np.float32]] = []
        self._actions: list[NDArray[np.int8]] = []
        self._rungs: list[list[int]] = []
        self._logp: list[NDArray[np.float32]] = []
        self._outcomes: list[tuple[RewardTerms, float, NDArray[Any]]] = []

    def __len__(self) -> int:
        """Decisions whose outcome is known."""
        return len(self._outcomes)

    @property
    def awaits_outcome(self) -> bool:
        return len(self._actions) > len(self._outcomes)

    def decide(self, observation: NDArray[np.float32], applied: Sequence[CompressionConfig], logp: NDArray[Any]) -> None:
        """What was seen (L, 64), what was put in force, and its log probabilities (L,)."""
        if self.awaits_outcome:
            raise ValueError("the decision before this one has no outcome yet")
        self._observations.append(np.array(observation, np.float32))
        self._actions.append(np.array([config.to_action() for config in applied], np.int8))
        self._rungs.append([self.ladder.nearest(config) for config in applied])
        self._logp.append(np.nan_to_num(np.asarray(logp, np.float32), nan=0.0))

    def outcome(self, terms: RewardTerms, loss: float, layer_bytes: NDArray[Any]) -> None:
        """What came of the last decision: its score, mean training loss and state bytes (L,)."""
        if not self.awaits_outcome:
            raise ValueError("an outcome needs a decision before it")
        self._outcomes.append((terms, loss, np.array(layer_bytes)))

    def episodes(self, observation: NDArray[np.float32], terminated: bool, attributes: Mapping[str, Any]) -> list[Episode]:
        """One episode per layer, from the decisions whose outcome is known; `observation` (L, 64) was seen after the last."""
        steps = len(self)
        seen = np.stack([*self._observations[:steps], np.asarray(observation, np.float32)])      # (T + 1, L, 64)
        actions, rungs, logp = (np.stack([np.asarray(x) for x in xs[:steps]]) for xs in (self._actions, self._rungs, self._logp))
        terms = [outcome[0] for outcome in self._outcomes]
        shared = {
            "loss": np.array([outcome[1] for outcome in self._outcomes], np.float32),
            "reward_loss": np.array([t.loss for t in terms], np.float32),
        }
        layered = {
            "bytes": np.stack([outcome[2] for outcome in self._outcomes]).astype(np.float32),    # (T, L)
            "error": np.stack([t.error for t in terms]),
            "behavior_logp": logp,
            "rung": rungs.astype(np.int16),
            "reward_memory": np.stack([t.memory for t in terms]),
            "reward_error": np.stack([t.error for t in terms]),
        }
        rewards = np.stack([t.rewards for t in terms])
        last = np.arange(steps) == steps - 1
        return [
            Episode(
                observations=seen[:, i],
                actions=actions[:, i],
                rewards=rewards[:, i],
                terminations=last & terminated,
                truncations=last & (not terminated),
                infos=shared | {name: values[:, i] for name, values in layered.items()},
                attributes={
                    **attributes,
                    "layer_index": layer.index,
                    "layer_name": layer.name,
                    "layer_kind": layer.kind,
                    "n_layers": len(self.layers),
                    "numel": layer.numel,
                },
            )
            for i, layer in enumerate(self.layers)
        ]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `record_run` did. `returns`: undiscounted, mean over layers; `evaluation`: held-out measures at the end."""

    run_id: str
    workload: str
    policy: str
    seed: int
    budget_bytes: int
    state_bytes_peak: int
    decisions: int
    episodes: int
    returns: float
    loss: float
    diverged: bool
    error: str | None
    evaluation: dict[str, float]
    seconds: float


def record_run(
    run: TrainingRun,
    policy: Any,
    writer: TrajectoryWriter | None,
    reward: Reward | None = None,
    *,
    policy_name: str | None = None,
    run_id: str | None = None,
    max_decisions: int | None = None,
) -> RunSummary:
    """Drive a run to its end with a policy and write one episode per layer (none where `writer` is None).

    `policy` is anything in `mango.policies`: `scores(obs)` is preferred over `act(obs)`, as the optimizer does. One that
    has `decide(run)` is given the whole run instead (a teacher that forks it). Log probabilities are read after every
    decision from its attribute `logp` (L,), 0 where it has none; they are of what it proposed. The episodes are
    terminated at the horizon and at divergence, truncated where `max_decisions` stopped them.
    """
    reward = reward or (writer.header.reward if writer is not None else Reward())
    return Recording(run, policy, reward, policy_name, run_id).record(writer, max_decisions)


def record_batch(recordings: Sequence["Recording"], writers: Sequence[TrajectoryWriter | None]) -> list[RunSummary]:
    """Record runs that are alike (`mango_env.batched_run`): their passes are shared, their episodes are not."""
    batch = BatchedRuns([recording.run for recording in recordings])
    while going := [recording for recording in recordings if not recording.run.done]:
        for recording in going:
            recording.decide()
        for recording, interval in zip(recordings, batch.advance(), strict=True):
            if interval is not None:
                recording.outcome(interval)
    return [recording.finish(writer) for recording, writer in zip(recordings, writers, strict=True)]


class Recording:
    """One run on its way into the store: `decide` and `outcome` in turn, then `finish`."""

    def __init__(self, run: TrainingRun, policy: Any, reward: Reward, name: str | None = None, run_id: str | None = None) -> None:
        reward.check_recordable()
        self.run, self.policy, self.reward, self.name = run, policy, reward, name or name_of(policy)
        self.run_id = run_id or f"{run.workload_name}-{self.name}-{run.seed}-{run.budget}-{uuid.uuid4().hex[:8]}"
        self.twin = twin_of(run) if reward.loss == "twin" else None
        self._track = Track(run.layers, run.optimizer.ladder)
        self._began, self._peak = time.perf_counter(), run.optimizer.state_bytes()
        self._last: Interval | None = None
        policy.reset()

    def record(self, writer: TrajectoryWriter | None, max_decisions: int | None = None) -> RunSummary:
        """Drive the run to its end, or for so many decisions."""
        while not self.run.done and (max_decisions is None or len(self._track) < max_decisions):
            self.decide()
            self.outcome(self.run.advance())
        return self.finish(writer)

    def decide(self) -> None:
        """Ask the policy and apply what it answers."""
        observation = self.run.observe()
        applied = self.run.apply(choose(self.policy, self.run, observation))
        self._track.decide(observation, applied, logp_of(self.policy, len(self.run.layers)))

    def outcome(self, interval: Interval) -> None:
        """What came of it."""
        self._last, self._peak = interval, max(self._peak, interval.state_bytes_peak)
        self._track.outcome(score(self.reward, interval, self.twin), interval.loss, interval.bytes)

    def finish(self, writer: TrajectoryWriter | None) -> RunSummary:
        """Take the held-out measures and write one episode per layer."""
        run, last = self.run, self._last
        evaluation, problem = run.evaluate_or_error()
        shared = facts(run, self.name, self.run_id, self.reward) | held_out(evaluation, self.twin, run.done and not run.diverged)
        episodes = [] if last is None else self._track.episodes(run.observe(), run.done, shared)
        if writer is not None:
            with interrupts_held():                          # all layers of a run or none
                for episode in episodes:
                    writer.add(episode)
        return RunSummary(
            run_id=self.run_id,
            workload=run.workload_name,
            policy=self.name,
            seed=run.seed,
            budget_bytes=run.budget,
            state_bytes_peak=self._peak,
            decisions=len(self._track),
            episodes=len(episodes) if writer is not None else 0,
            returns=float(np.mean([episode.returns for episode in episodes])) if episodes else 0.0,
            loss=math.nan if last is None else last.loss,
            diverged=run.diverged,
            error=(None if last is None else last.error) or problem,
            evaluation=evaluation,
            seconds=time.perf_counter() - self._began,
        )


def held_out(evaluation: Mapping[str, float], twin: Twin | None, whole: bool) -> Attributes:
    """`val_loss` at the end of a whole run, and `val_loss_full`, its twin's; those that are known and finite."""
    found = {"val_loss": evaluation, "val_loss_full": {} if twin is None else twin.evaluation}
    losses = {name: measures.get("val_loss", math.nan) for name, measures in found.items() if whole}
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def choose(policy: Any, run: TrainingRun, observation: NDArray[np.float32]) -> Any:
    """What a policy proposes for a run, in a form that `TrainingRun.apply` takes."""
    if hasattr(policy, "decide"):
        return policy.decide(run)
    seen = torch.from_numpy(observation)
    with torch.no_grad():
        return policy.scores(seen) if isinstance(policy, ScoringPolicy) else policy.act(seen)


def logp_of(policy: Any, layers: int) -> NDArray[np.float32]:
    """Log probabilities (L,) of a policy's last proposal; zeros where it offers none or is deterministic."""
    logp = getattr(policy, "logp", None)
    return np.zeros(layers, np.float32) if logp is None else np.asarray(logp, np.float32).reshape(layers)


def name_of(policy: Any) -> str:
    """How files call a policy: its own `name`, its name in the table, or its class."""
    named = getattr(policy, "name", None)
    if isinstance(named, str) and named:
        return named
    return next((name for name, cls in POLICIES.items() if type(policy) is cls), type(policy).__name__)


def facts(run: TrainingRun, policy: str, run_id: str, reward: Reward) -> Attributes:
    """What all episodes of a run share."""
    clipped = {} if run.max_grad_norm is None else {"max_grad_norm": float(run.max_grad_norm)}
    return {
        "run_id": run_id,
        "workload": run.workload_name,
        "policy": policy,
        "seed": run.seed,
        "budget_bytes": run.budget,
        "adamw_bytes": run.optimizer.adamw_bytes,
        "horizon": run.horizon,
        "interval": run.interval,
        "lr": run.lr,
        "rule": run.rule,
        "matrix_lr_scale": float(run.hyper.get("matrix_lr_scale", 1.0)),
        "schedule": run.schedule,
        "reward": reward.to_json(),
        "mango_version": mango.__version__,
        **clipped,
    }


class TrajectoryRecorder:
    """Log the episodes of an ordinary training loop: one per layer, from the optimizer's own decisions.

    >>> from mango import MANGO
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = MANGO(model.named_parameters(), policy="random", memory_budget=0.5, policy_update_freq=2)
    >>> with TrajectoryRecorder(optimizer, "runs/mine", workload="mine") as recorder:      # doctest: +SKIP
    ...     for step in range(10):
    ...         loss = model(torch.randn(8, 64)).square().mean()
    ...         optimizer.zero_grad(); loss.backward(); optimizer.observe_loss(loss); optimizer.step()

    The loss comes from `optimizer.observe_loss` or `optimizer.step(closure)`; without one the first decision raises a
    ValueError. The configs in force when recording starts count as the first decision. What follows the last decision
    is not recorded, since nothing was measured after it. Episodes are terminated where the optimizer's `total_steps`
    were reached or the loss stopped being finite, and truncated otherwise. `episode_decisions` cuts a long run into
    episodes of that many decisions, written as they are complete, so that little is lost when the job is killed.

    Under DDP every process records its own shard: `run_id` gets the rank (environment variable RANK) as a suffix.
    """

    def __init__(
        self,
        optimizer: MANGO,
        path: str | os.PathLike[str],
        *,
        workload: str = "user",
        policy_name: str | None = None,
        run_id: str | None = None,
        reward: Reward | None = None,
        episode_decisions: int | None = None,
        seed: int = 0,
    ) -> None:
        self.reward = reward or Reward(loss="raw")
        self.reward.check_recordable()
        if self.reward.loss != "raw":
            raise ValueError(f"loss={self.reward.loss!r} needs a workload that can be run twice; record with Reward(loss='raw')")
        self.episode_decisions = None if episode_decisions is None else whole_number("episode_decisions", episode_decisions)
        self.optimizer, self.workload, self.seed = optimizer, workload, seed
        self.policy_name = policy_name or name_of(optimizer.policy)
        rank = os.environ.get("RANK")
        self.run_id = (run_id or f"{workload}-{uuid.uuid4().hex[:12]}") + (f"-rank{rank}" if rank is not None else "")
        self._adamw = np.array([8 * layer.numel for layer in optimizer.layers], np.int64)
        self._first = self._previous = math.nan
        self._parts, self._diverged = 0, False
        self._writer = TrajectoryWriter(path, task=workload, policy=self.policy_name, reward=self.reward, ladder=optimizer.ladder)
        self._seen = optimizer.observe().numpy()
        self._track = Track(optimizer.layers, optimizer.ladder)
        self._decided(self._seen, optimizer.applied, optimizer.layer_bytes().numpy())
        self._hook: Any = optimizer.register_decision_hook(self._on_decision)

    @property
    def recorded(self) -> int:
        """Episodes written so far."""
        return self._writer.recorded

    def _decided(self, observation: NDArray[np.float32], applied: Sequence[CompressionConfig], nbytes: NDArray[Any]) -> None:
        self._track.decide(observation, applied, logp_of(self.optimizer.policy, len(applied)))
        self._bytes = nbytes

    def _on_decision(self, decision: Decision) -> None:
        if self._diverged:
            return
        if len(decision.applied) != len(self._adamw):
            raise ValueError("the optimizer's layers changed while recording: close the recorder before add_param_group")
        finite = math.isfinite(decision.loss)
        if not finite and math.isnan(self._first):
            raise ValueError("no finite loss was seen: call optimizer.observe_loss(loss) before step(), or give step() a closure")
        self._diverged = not finite
        loss = decision.loss if finite else self._previous
        left = -(-max(0, (self.optimizer.total_steps or 0) - decision.step) // self.optimizer.policy_update_freq)
        terms = self.reward.terms(
            loss=loss,
            reference=None if math.isnan(self._previous) else self._previous,
            first=loss if math.isnan(self._first) else self._first,
            layer_bytes=self._bytes,
            adamw_bytes=self._adamw,
            errors=decision.errors.numpy(),
            lost_decisions=0 if finite else 1 + left,
        )
        self._track.outcome(terms, loss, self._bytes)
        self._first = loss if math.isnan(self._first) else self._first
        self._previous, self._seen = loss, decision.observation.numpy()
        if len(self._track) == self.episode_decisions:
            self._flush()
        self._decided(self._seen, decision.applied, decision.bytes.numpy())

    @interrupts_held()
    def _flush(self) -> None:
        """Write the decisions whose outcome is known, as one episode per layer."""
        if not len(self._track):
            return
        steps, freq = self.optimizer.steps, self.optimizer.policy_update_freq
        total = self.optimizer.total_steps
        over = self._diverged or (total is not None and steps >= total - total % freq)
        attributes: Attributes = {
            "run_id": self.run_id if self.episode_decisions is None else f"{self.run_id}.{self._parts}",
            "workload": self.workload,
            "policy": self.policy_name,
            "seed": self.seed,
            "budget_bytes": self.optimizer.memory_budget,
            "adamw_bytes": self.optimizer.adamw_bytes,
            "horizon": total or steps,
            "interval": freq,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "rule": self.optimizer.param_groups[0]["rule"],
            "reward": self.reward.to_json(),
            "mango_version": mango.__version__,
        }
        for episode in self._track.episodes(self._seen, over, attributes):
            self._writer.add(episode)
        self._parts += 1
        self._track = Track(self.optimizer.layers, self.optimizer.ladder)

    @interrupts_held()
    def close(self) -> Path:
        """Stop recording, write what is left, and return the store's root. Calling it again does nothing."""
        self._hook.remove()
        try:
            self._flush()
        finally:
            root = self._writer.close()
        return root

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()                                         # an interrupted run keeps what it has


class GradientProfiler:
    """Gradient statistics of a whole run as CSV: one row per decision and layer, all 64 features, bytes and error.

    Written aside (`.tmp`) and renamed by `close`; every decision is flushed, so a killed run leaves its rows there.
    """

    COLUMNS = ("step", "layer_index", "layer_name", "config", "bytes", "error", *(feature.name for feature in FEATURES))

    def __init__(self, optimizer: MANGO, path: str | os.PathLike[str]) -> None:
        self.optimizer, self.path = optimizer, Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.with_name(self.path.name + ".tmp")
        self._file = self._aside.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(self.COLUMNS)
        self._hook: Any = optimizer.register_decision_hook(self._on_decision)

    def _on_decision(self, decision: Decision) -> None:
        facts = zip(self.optimizer.layers, decision.applied, decision.bytes.tolist(), decision.errors.tolist(), strict=True)
        for row, (layer, config, nbytes, error) in zip(decision.observation.tolist(), facts, strict=True):
            self._rows.writerow([decision.step, layer.index, layer.name, config.name, nbytes, error, *row])
        self._file.flush()

    def close(self) -> Path:
        """End the profile and give the file its name."""
        self._hook.remove()
        if not self._file.closed:
            self._file.close()
            os.replace(self._aside, self.path)
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
