"""One policy through all stages: its weights cross into Stable-Baselines3 and d3rlpy and back, and no logit changes.

A `PolicyNetwork` keeps its normaliser, trunk and heads; SB3 gets the trunk as features extractor (once for the actor,
once for the critic) and a head as `action_net`. Checkpoints of SB3 (`.zip`) and d3rlpy (`.d3`) are pickles, which run
whatever code their author put in: `convert` refuses them unless the caller vouches for the file.
"""

import types
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mango.networks import PolicyNetwork
from mango_env.adapters import import_d3rlpy, quiet_gym

if TYPE_CHECKING:
    from train_policy.sb3_modules import AnchoredPolicy

HEADS = ("rung", "knobs")


class Converted(NamedTuple):
    """A network from a checkpoint, and the head that the checkpoint had trained ("rung" or "knobs")."""

    network: PolicyNetwork
    head: str


def clone(network: PolicyNetwork) -> PolicyNetwork:
    """An independent copy with the same weights and normaliser."""
    copy = PolicyNetwork(**network.architecture)
    copy.load_state_dict(network.state_dict())
    return copy


def check_head(head: str) -> str:
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; known: {', '.join(HEADS)}")
    return head


def import_sb3() -> types.ModuleType:
    """Stable-Baselines3, without the notice that the dead `gym` prints when SB3 finds it."""
    quiet_gym()
    try:
        import stable_baselines3
    except ImportError as error:
        raise ImportError('PPO needs Stable-Baselines3: pip install "mango-optim[train]"') from error
    return stable_baselines3


def sb3_policy_kwargs(network: PolicyNetwork) -> dict[str, Any]:
    """`policy_kwargs` with which SB3 builds an actor and a critic of this network's shape.

    Raises ValueError for a trunk with memory: SB3's PPO carries no state.
    """
    if network.trunk.has_memory:
        raise ValueError(f"PPO through Stable-Baselines3 carries no memory: it takes architecture 'mlp', got {network.name!r}")
    import_sb3()
    from train_policy.sb3_modules import TrunkExtractor

    return {
        "features_extractor_class": TrunkExtractor,
        "features_extractor_kwargs": {"architecture": dict(network.architecture)},
        "net_arch": [],
        "share_features_extractor": False,
        "ortho_init": False,
    }


def to_sb3(network: PolicyNetwork, policy: "AnchoredPolicy", head: str = "rung") -> None:
    """Copy trunk, one head and the value head into an SB3 policy built with `sb3_policy_kwargs(network)`."""
    source = network.rung_head if check_head(head) == "rung" else network.knob_head
    outputs = policy.action_net.weight.shape[0]
    if outputs != source.out_features:
        raise ValueError(
            f"the environment's action space has {outputs} logits, the {head} head {source.out_features}: "
            "use a Discrete space over the ladder with head='rung', MultiDiscrete over the knobs with head='knobs'"
        )
    policy.pi_features_extractor.trunk.load_state_dict(network.trunk.state_dict())
    policy.vf_features_extractor.trunk.load_state_dict(network.trunk.state_dict())
    policy.action_net.load_state_dict(source.state_dict())
    policy.value_net.load_state_dict(network.value_head.state_dict())


def from_sb3(policy: "AnchoredPolicy", base: PolicyNetwork | None = None) -> Converted:
    """A network with the SB3 actor's trunk and head; the other heads come from `base` or stay as initialised.

    The trunk moved with the head that was trained, so the other head is stale: freeze the head that is returned.
    """
    extractor = policy.pi_features_extractor
    if not hasattr(extractor, "trunk") or not hasattr(extractor, "architecture"):
        raise ValueError(
            f"the SB3 policy's features extractor is a {type(extractor).__name__}, not our TrunkExtractor: "
            "train with policy_kwargs=sb3_policy_kwargs(network)"
        )
    network = clone(base) if base is not None else PolicyNetwork(**extractor.architecture)
    network.trunk.load_state_dict(extractor.trunk.state_dict())
    head = "knobs" if hasattr(policy.action_space, "nvec") else "rung"
    ours, theirs = (network.rung_head if head == "rung" else network.knob_head), policy.action_net
    if ours.weight.shape != theirs.weight.shape:
        raise ValueError(f"the SB3 policy has {theirs.weight.shape[0]} logits, the {head} head {ours.out_features}")
    ours.load_state_dict(theirs.state_dict())
    return Converted(network.eval(), head)


def convert(path: str | Path, *, trust_pickle: bool = False) -> Converted:
    """Read an SB3 `.zip` or a d3rlpy `.d3` checkpoint as a `PolicyNetwork`.

    Both are pickles: loading one runs code that its author chose, so nothing of the file is read unless
    `trust_pickle=True`. Policies to share are frozen files (safetensors), which cannot run code.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no checkpoint at {file}")
    if file.suffix not in (".zip", ".d3"):
        raise ValueError(f"{file} is not a training checkpoint; expected a Stable-Baselines3 .zip or a d3rlpy .d3 file")
    if not trust_pickle:
        raise ValueError(
            f"{file} is a pickle and can run any code when loaded; pass trust_pickle=True (--trust-pickle) "
            "only for a file that you made yourself"
        )
    return _from_zip(file) if file.suffix == ".zip" else _from_d3(file)


def _from_zip(file: Path) -> Converted:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is not a zip file; it is truncated or was not written by Stable-Baselines3")
    policy: Any = import_sb3().PPO.load(file, device="cpu").policy
    return from_sb3(policy)


def _from_d3(file: Path) -> Converted:
    from train_policy.d3rlpy_backend import network_of, register

    register()
    return Converted(network_of(import_d3rlpy().load_learnable(str(file), device="cpu:0")), "rung")


def greedy(network: PolicyNetwork, observations: torch.Tensor, head: str = "rung") -> torch.Tensor:
    """The most probable action of one head: rungs (B, 1) or knob indices (B, 7)."""
    with torch.no_grad():
        return network.distribution(network(observations), check_head(head)).mode()
