"""Behaviour cloning: a policy network imitates the best recorded decisions, or those of a named teacher.

Both heads learn at once: the knobs by a factored cross-entropy, the rung by one over the ladder. Held-out runs, not
held-out steps, say when to stop.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mango.config import KNOBS
from mango.networks import PolicyNetwork, PolicyOutput
from mango_env.cache import TrajectoryCache
from train_policy.batches import Loader, Steps, check_network, prepare_normaliser, select_best, select_policies, split_runs
from train_policy.fitting import TrainingInterrupted, progress_line, save_checkpoint
from train_policy.transfer import check_head, clone

LEAST_UPDATES = 20                                       # per epoch


@dataclass(frozen=True, slots=True)
class BcArgs:
    """What to imitate and how."""

    policies: tuple[str, ...] = ()                       # behaviours to imitate; empty: all
    top: float | None = None                             # best share of runs per setting; None: all of named teachers, else 0.25
    validation: float = 0.2                              # share of runs held out
    epochs: int = 60
    batch_size: int = 256                                # decisions; a trunk with memory takes as many in whole episodes
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    patience: int = 10                                   # epochs without a better held-out accuracy before stopping
    gamma: float = 0.99                                  # of the returns that the value head learns
    head: str = "rung"                                   # the head that decides when it is deployed, and when to stop
    fit_normaliser: bool | None = None                   # None: only that of a network that never was trained
    seed: int = 0

    def __post_init__(self) -> None:
        check_head(self.head)
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def share(self) -> float:
        """The share of runs that is imitated."""
        return self.top if self.top is not None else 1.0 if self.policies else 0.25


@dataclass(frozen=True, slots=True)
class BcResult:
    """The clone, and how often it decides as its teacher on runs that it never saw."""

    network: PolicyNetwork
    head: str
    accuracy: dict[str, float]                           # on held-out runs: "rung", "knobs" (all seven), and each knob
    best_epoch: int
    runs: int                                            # imitated, held-out ones included
    decisions: int
    digest: str                                          # of the store
    curves: tuple[dict[str, float], ...] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        return {f"accuracy_{name}": value for name, value in self.accuracy.items()} | {"best_epoch": float(self.best_epoch)}


def train(
    network: PolicyNetwork,
    cache: TrajectoryCache,
    args: BcArgs | None = None,
    *,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> BcResult:
    """Clone the selected decisions of `cache`, starting from `network`, which is left as it was.

    `checkpoint`: policy file with the best weights so far, rewritten after every epoch that improved; Ctrl-C keeps it
    and raises `TrainingInterrupted`. Equal arguments give equal weights.

    Raises ValueError where the selection has fewer than two runs, where its ladder is not the network's, or for a
    tree that asks nothing.
    """
    args = args or BcArgs()
    check_network(network, cache)
    chosen = select_best(select_policies(cache, args.policies) if args.policies else cache, args.share)
    training, validation = split_runs(chosen, args.validation, args.seed)
    student, best = clone(network), clone(network)
    prepare_normaliser(student, training, args.fit_normaliser, args.seed)
    best.load_state_dict(student.state_dict())
    sequences = student.trunk.has_memory
    loader = Loader(training, args.batch_size, args.seed, sequences=sequences, gamma=args.gamma)
    held = Loader(validation, 4096, args.seed, sequences=sequences, gamma=args.gamma)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    card = {"stage": "bc", "args": asdict(args), "training_data_digest": cache.digest}
    curves: list[dict[str, float]] = []
    best_epoch, best_score = 0, -1.0
    with progress_line("BC", args.epochs, progress) as advance:
        try:
            for epoch in range(1, args.epochs + 1):
                loss = _fit_epoch(student, loader, optimizer)
                found = accuracy(student, held)
                curves.append({"epoch": float(epoch), "loss": loss, **found})
                advance(1, status=f"held-out {args.head} accuracy {found[args.head]:.3f}")
                score = found[args.head] + 1e-3 * (found["rung"] + found["knobs"])           # the other head breaks ties
                if score > best_score:
                    best_epoch, best_score = epoch, score
                    best.load_state_dict(student.state_dict())
                    save_checkpoint(best, checkpoint, head=args.head, card={**card, "epoch": epoch, "accuracy": found})
                elif epoch - best_epoch >= args.patience:
                    break
        except KeyboardInterrupt as interrupt:
            save_checkpoint(best, checkpoint, head=args.head, card={**card, "epoch": best_epoch})
            raise TrainingInterrupted("behaviour cloning", checkpoint, f"{len(curves)} epochs") from interrupt
    runs = len(set(chosen.attributes["run_id"]))
    final = {name: value for name, value in curves[best_epoch - 1].items() if name not in ("epoch", "loss")}
    return BcResult(best.eval(), args.head, final, best_epoch, runs, len(chosen), cache.digest, tuple(curves))


def imitate(
    network: PolicyNetwork, steps: Steps, values: Tensor, optimizer: torch.optim.Optimizer, weights: Tensor | None = None
) -> Tensor:
    """One update towards the recorded decisions, each weighted (B,), and of the value head towards `values` (B,).

    Returns the cross-entropy of both heads, a scalar. The value head reads the features without shaping them: it is the
    critic that fine-tuning starts from.
    """
    features, _ = network.trunk.step(steps.observations)
    output = PolicyOutput(network.knob_head(features), network.rung_head(features), values, None)
    rung = network.distribution(output, "rung").log_prob(steps.rungs.unsqueeze(-1))
    knobs = network.distribution(output, "knobs").log_prob(steps.actions) / len(KNOBS)
    loss = steps.mean(-(rung + knobs) * (1.0 if weights is None else weights))
    value = network.value_head(features.detach()).squeeze(-1)
    optimizer.zero_grad()
    (loss + steps.mean(F.smooth_l1_loss(value, values, reduction="none"))).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _fit_epoch(network: PolicyNetwork, loader: Loader, optimizer: torch.optim.Optimizer) -> float:
    """One pass; returns the mean imitation loss."""
    network.train()
    losses = [float(imitate(network, steps, steps.to_go, optimizer)) for steps in _updates(loader)]
    network.eval()
    return sum(losses) / len(losses)


def _updates(loader: Loader) -> Iterator[Steps]:
    """Every batch once; of small data as many passes as make `LEAST_UPDATES`, so that patience means something."""
    for _ in range(max(1, LEAST_UPDATES // len(loader))):
        yield from loader.epoch()


def accuracy(network: PolicyNetwork, loader: Loader) -> dict[str, float]:
    """How often the greedy decisions equal the recorded ones: by rung, by all knobs together, by each knob."""
    right: dict[str, Tensor] = {}
    total = torch.zeros(())
    with torch.no_grad():
        for steps in loader.epoch():
            output: Any = network(steps.observations)
            knobs = network.distribution(output, "knobs").mode() == steps.actions             # (B, 7)
            rung = network.distribution(output, "rung").mode().squeeze(-1) == steps.rungs
            hits = {"rung": rung, "knobs": knobs.all(-1), **{name: knobs[..., k] for k, name in enumerate(KNOBS)}}
            for name, hit in hits.items():
                right[name] = right.get(name, torch.zeros(())) + (hit.float() * steps.mask).sum()
            total = total + steps.mask.sum()
    return {name: float(hit / total) for name, hit in right.items()}
