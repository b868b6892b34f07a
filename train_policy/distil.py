"""Teach a network's heads what another head, or another library's algorithm, has learned; the trunk stays as it is."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mango.config import LADDER, NVEC, Ladder
from mango.networks import PolicyNetwork

LEAST_UPDATES = 300
KNOB_SHARPNESS = 5.0                                     # of the rung probabilities whose marginals the knobs learn


@cache
def rung_knobs(ladder: Ladder = LADDER) -> Tensor:
    """(R, 34): the one-hot knob entries of every rung."""
    actions = torch.tensor([rung.to_action() for rung in ladder])
    return torch.cat([F.one_hot(actions[:, k], n) for k, n in enumerate(NVEC)], 1).float()


def knob_marginals(rung_probabilities: Tensor, ladder: Ladder = LADDER) -> Tensor:
    """(N, 34): the probability of every knob entry under probabilities over rungs (N, R)."""
    return rung_probabilities @ rung_knobs(ladder)


def positions(actions: Tensor) -> Tensor:
    """Knob indices (..., 7) as positions on their menus in [-1, 1], as continuous algorithms see them."""
    return 2 * actions.float() / (torch.tensor(NVEC) - 1) - 1


def nearest_targets(wanted: Tensor, sharpness: float = 8.0, ladder: Ladder = LADDER) -> tuple[Tensor, Tensor]:
    """Soft targets for both heads from continuous choices (N, 7) in [-1, 1]: (rung probabilities, knob probabilities).

    The nearest rung and menu entries are the likeliest, and farther ones fall off with the squared distance: so the
    budget, where it cannot grant what was wanted, finds the next best near it.
    """
    rungs = positions(torch.tensor([rung.to_action() for rung in ladder]))                    # (R, 7)
    rung_probs = (-sharpness * (wanted[:, None] - rungs).square().sum(2)).softmax(1)
    knob_probs = [
        (-sharpness * (wanted[:, k, None] - torch.linspace(-1, 1, n)).square()).softmax(1) for k, n in enumerate(NVEC)
    ]
    return rung_probs, torch.cat(knob_probs, 1)


def distil(
    network: PolicyNetwork,
    observations: Tensor,
    *,
    rungs: Tensor | None = None,
    knobs: Tensor | None = None,
    values: Tensor | None = None,
    updates: int | None = None,
    batch_size: int = 256,
    lr: float = 1e-2,
    seed: int = 0,
) -> None:
    """Train heads in place towards targets: rung probabilities (N, R), knob probabilities (N, 34), values (N,).

    Only heads with a target change. `updates`: None means one pass, of small data as many as make `LEAST_UPDATES`.
    Observations are (N, 64), seen one by one: a trunk with memory is refused.
    """
    if network.trunk.has_memory:
        raise ValueError("distillation sees single observations; a trunk with memory needs sequences: use architecture 'mlp'")
    asked = ((network.rung_head, rungs), (network.knob_head, knobs), (network.value_head, values))
    jobs = [(head, target) for head, target in asked if target is not None]
    if not jobs:
        raise ValueError("nothing to distil: give rungs, knobs or values")
    with torch.no_grad():
        features: Tensor = network.trunk(observations)
    optimizer = torch.optim.Adam([p for head, _ in jobs for p in head.parameters()], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates if updates is not None else max(LEAST_UPDATES, len(features) // batch_size)):
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        loss = torch.zeros(())
        for head, target in jobs:
            output = head(features[rows])
            if head is network.value_head:
                loss = loss + F.smooth_l1_loss(output.squeeze(1), target[rows])
            else:
                sizes = [output.shape[1]] if head is network.rung_head else list(NVEC)
                logs = torch.cat([part.log_softmax(1) for part in output.split(sizes, 1)], 1)
                loss = loss - (target[rows] * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def score_spread(scores: Tensor) -> float:
    """The mean over rows of the standard deviation between rungs of scores (N, R)."""
    return max(float(scores.std(1, correction=0).mean()), 1e-6)


def distil_scores(
    network: PolicyNetwork,
    observations: Tensor,
    scores: Tensor,
    *,
    values: Tensor,
    spread: float = 1.0,
    ladder: Ladder = LADDER,
    seed: int = 0,
) -> None:
    """Teach the knob head a sharp softmax of rung scores (N, R), which have that spread, and the value head values (N,)."""
    probabilities = (KNOB_SHARPNESS * scores / spread).softmax(1)
    distil(network, observations, knobs=knob_marginals(probabilities, ladder), values=values, seed=seed)


def adopt_values(network: PolicyNetwork, weight: Tensor, bias: Tensor, observations: Tensor, *, seed: int = 0) -> float:
    """Make a policy of action values that are linear in the trunk's features: rung logits become Q / T, exactly.

    T is the mean over `observations` of the spread (standard deviation over rungs) of Q, so the logits have spread one;
    the greedy rung, and what the knapsack picks, do not depend on it. The knob head learns the marginals of a sharper
    softmax (of flat ones the likeliest entries belong to no rung), the value head max Q. Returns T.
    """
    with torch.no_grad():
        q = F.linear(network.trunk(observations), weight, bias)                               # (N, R)
        temperature = score_spread(q)
        network.rung_head.weight.copy_(weight / temperature)
        network.rung_head.bias.copy_(bias / temperature)
    distil_scores(network, observations, q, values=q.amax(1), spread=temperature, seed=seed)
    return temperature
