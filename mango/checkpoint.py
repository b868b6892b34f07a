"""What an optimizer's state dict holds: plain tensors and JSON-able scalars, so that resuming is bit-exact."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mango.accounting import Usage
from mango.config import CompressionConfig
from mango.master import refit
from mango.state import TensorState

if TYPE_CHECKING:
    from mango.optimizer import MANGO


def save(optimizer: "MANGO", plain: dict[str, Any]) -> dict[str, Any]:
    """Complete what torch's own `state_dict` gave: states flattened, and under "mango" what belongs to no one tensor."""
    optimizer.pager.settle()
    optimizer.skipped += optimizer.fused.settle()
    plain["state"] = {i: state["tensor"].to_plain() for i, state in plain["state"].items()}
    inner = getattr(optimizer.policy, "state_dict", None)
    plain["mango"] = {
        "steps": optimizer.steps, "skipped": optimizer.skipped, "peak_lr": optimizer.peak_lr, "seed": optimizer.seed,
        "usage": asdict(optimizer.usage), "price": optimizer.budget.price, "budget": optimizer.memory_budget,
        "losses": optimizer.losses.state_dict(), "applied": [config.to_dict() for config in optimizer.applied],
        "statistics": optimizer.statistics.state_dict(), "policy": inner() if inner is not None else None,
        "held": optimizer.held.state_dict() if optimizer.held is not None else None,
    }  # fmt: skip
    return optimizer.ranks.wrap(plain)


def check(optimizer: "MANGO", state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, as it was before `save` filed it by rank. ValueError unless it fits: before anything is changed."""
    state_dict = optimizer.ranks.unwrap(state_dict)
    if "mango" not in state_dict:
        raise ValueError(f"this state dict is not MANGO's: it has {sorted(state_dict)}, and no 'mango'")
    layers = len(state_dict["mango"]["applied"])
    if layers != len(optimizer.layers):
        raise ValueError(f"the state dict has {layers} layers, this optimizer {len(optimizer.layers)}")
    for i, flat in state_dict["state"].items():
        target = optimizer.targets[int(i)]
        own, saved = tuple(target.local.shape), tuple(flat["shape"])
        if own != saved:
            raise ValueError(f"{target.name} has shape {own}; the state saved for it is of shape {saved}")
        if flat["rule"] != target.rule:
            raise ValueError(f"{target.name} is moved by the rule {target.rule}; the state saved for it is of {flat['rule']}")
    return state_dict


def restore(optimizer: "MANGO", state_dict: Mapping[str, Any]) -> None:
    """Put everything back, after torch has put back the groups. What exceeds the optimizer's own budget is cut to it."""
    mine = state_dict["mango"]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for group, target in zip(groups, optimizer.targets, strict=True):
        target.group = group
    optimizer.applied = [CompressionConfig.from_dict(config) for config in mine["applied"]]
    optimizer.steps, optimizer.skipped, optimizer.peak_lr = mine["steps"], mine["skipped"], mine["peak_lr"]
    optimizer.seed, optimizer.usage, optimizer.budget.price = mine["seed"], Usage(**mine["usage"]), mine["price"]
    optimizer.losses.load_state_dict(mine["losses"])
    optimizer.statistics.load_state_dict(mine["statistics"])
    if optimizer.budget_asked is None:                       # a share of what was free then, not of what is free now
        optimizer.budget.total = mine["budget"]
    optimizer.place_layers()
    for i, flat in state_dict["state"].items():
        target = optimizer.targets[int(i)]
        state = TensorState.from_plain(flat, optimizer.options, target.local.device)
        state.correction = refit(state.correction, target.local, optimizer.master_bits)
        state.transcode(state.config, optimizer.key_of(target))      # nothing to do unless the options differ
        optimizer.pager.adopt(state, target.layer)
        optimizer.state[target.param]["tensor"] = state
    optimizer.new_fused()
    if optimizer.held is not None:
        optimizer.held.load_state_dict(mine.get("held"))
    inner = getattr(optimizer.policy, "load_state_dict", None)
    if inner is not None and mine["policy"] is not None:
        inner(mine["policy"])
    if not optimizer.ranks.all(optimizer.allocator.fits(optimizer.applied)):
        optimizer.apply(optimizer.applied)
