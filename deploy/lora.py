"""LoRA: a trained model stands still, low-rank adapters beside its linear layers learn, their state inside a byte budget.

    python -m deploy.lora                                              no download: code first, then prose; half a minute
    python -m deploy.lora --workload bert_pairs --whole head --rank 16 --lr 1e-3     a trained MiniLM on pairs of paragraphs

Without `--workload` a small character transformer is trained on the standard library's source by AdamW, and its adapters
(Hu et al. 2022) on the prose of Python's language reference. The same adapters are trained twice, from the same weights on the
same batches: by AdamW and by MANGO; the bytes of both are counted. Copy `adapt` and `merge` and put your model in place.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from deploy.ddp import parse
from mango import MANGO
from mango_env.workloads import Workload, make_workload
from mango_env.workloads.data import TextData
from mango_env.workloads.text import LanguageModel, encode_text


@dataclass
class Args:
    """What the command line may change."""

    workload: str = ""                                       # any with a trained model; without, prose after source code
    pretrain: int = 150                                      # steps of AdamW on source_lm, without a workload
    rank: int = 8                                            # of the adapters
    alpha: float = 16.0                                      # adapters count alpha / rank times
    whole: str = ""                                          # parts that train whole, comma-separated, such as a new head
    steps: int = 100                                         # of fine-tuning
    lr: float = 5e-3                                         # learning rate of the adapters
    fraction: float = 0.25                                   # of the state bytes that AdamW takes for them
    min_numel: int = 256                                     # smaller tensors keep full precision
    policy: str = "water-filling"                            # a shipped name, a path or a heuristic
    interval: int = 10                                       # steps between decisions
    seed: int = 0
    folder: str = "runs/lora"                                # of result.json and adapters.safetensors


class Adapted(nn.Module):
    """A linear layer that stands still, and a product of two thin matrices that learns what to add to it; zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        out, into = linear.weight.shape
        drawn = torch.randn(rank, into, generator=generator) / math.sqrt(into)
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.lora_a = nn.Parameter(drawn.to(linear.weight))                        # (rank, into)
        self.lora_b = nn.Parameter(linear.weight.new_zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:                                        # (..., into)
        y: Tensor = self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale
        return y

    def merged(self) -> nn.Linear:
        """One linear layer that does the same."""
        with torch.no_grad():
            self.linear.weight += self.scale * self.lora_b @ self.lora_a
        return self.linear


def children(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, str]]:
    """Every part of a kind: the module that has it, its name there, its name in the model."""
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and not isinstance(parent, Adapted):
                yield parent, name, f"{path}.{name}".lstrip(".")


def adapt(model: nn.Module, rank: int, alpha: float, whole: str = "", seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """Put an adapter beside every linear layer but those that train whole; returns what learns, by name."""
    kept = tuple(part for part in whole.split(",") if part)
    known = [name for name, _ in model.named_modules()]
    if unknown := [part for part in kept if part not in known]:
        there = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"whole={whole!r}: the model has no part {unknown[0]!r}; it has {there}, and parts of these")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, path in children(model, nn.Linear):
        if path not in kept:
            setattr(parent, name, Adapted(getattr(parent, name), rank, alpha, generator))
    for part in kept:
        model.get_submodule(part).requires_grad_(True)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def merge(model: nn.Module) -> None:
    """Adapters into the weights beside them: the model is as fast and as large as it was."""
    for parent, name, _ in children(model, Adapted):
        setattr(parent, name, getattr(parent, name).merged())


def prose(seed: int, steps: int) -> LanguageModel:
    """Python's language reference, which comes with it as plain text, for a model of `source_lm`'s sizes."""
    from pydoc_data.topics import topics

    text = encode_text("\n".join(topics.values()))
    cut = len(text) * 9 // 10
    sizes = {"batch": 16, "context": 64, "width": 64, "depth": 2, "heads": 4}
    return LanguageModel(TextData(text[:cut], text[cut:]), seed, steps=steps, lr=0.0, **sizes)


def trained(args: Args) -> Workload:
    """The workload to fine-tune on, its model as it was trained before."""
    if args.workload:
        return make_workload(args.workload, args.seed)
    base, workload = make_workload("source_lm", args.seed), prose(args.seed, args.steps)
    descend(AdamW(base.model.parameters(), lr=3e-3), base, args.pretrain)
    workload.model.load_state_dict(base.model.state_dict())
    return workload


def descend(optimizer: Optimizer, workload: Workload, steps: int) -> tuple[list[float], int]:
    """Train; the losses, and the most bytes of state after a step."""
    losses, held = [], 0
    for _ in range(steps):
        optimizer.zero_grad()
        loss = workload.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(optimizer, MANGO):
            optimizer.observe_loss(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
        held = max(held, state_bytes(optimizer))
    return losses, held


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of everything that it keeps; of torch's, of all tensors in its state."""
    if isinstance(optimizer, MANGO):
        return optimizer.state_bytes()
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def fine_tune(args: Args, workload: Workload, name: str) -> dict[str, Any]:
    """Adapters on the model, trained by "adamw" or "mango"; the model's held-out loss before and after."""
    before = workload.evaluate()["val_loss"]
    learning = adapt(workload.model, args.rank, args.alpha, args.whole, args.seed)
    optimizer: Optimizer = AdamW((p for _, p in learning), lr=args.lr, weight_decay=0)
    if name == "mango":
        optimizer = MANGO(learning, lr=args.lr, memory_budget=args.fraction, policy=args.policy, min_numel=args.min_numel,
                          policy_update_freq=args.interval, total_steps=args.steps)  # fmt: skip
    losses, held = descend(optimizer, workload, args.steps)
    return {
        "optimizer": name, "learning": sum(p.numel() for _, p in learning), "state_bytes": held, "first_loss": losses[0],
        "loss": sum(losses[-10:]) / len(losses[-10:]), "val_loss_before": before, "val_loss": workload.evaluate()["val_loss"],
    }  # fmt: skip


def train(args: Args) -> Path:
    workload, folder, rows = trained(args), Path(args.folder), []
    folder.mkdir(parents=True, exist_ok=True)
    numel = sum(p.numel() for p in workload.model.parameters())
    for name in ("adamw", "mango"):                          # MANGO's adapters are kept
        own = copy.deepcopy(workload)
        rows.append(fine_tune(args, own, name))
        print("{optimizer}: held-out loss {val_loss_before:.4f} -> {val_loss:.4f}; {learning:,} numbers learn, {state_bytes:,}"
              " bytes of state".format(**rows[-1]))  # fmt: skip
    adapters = {name: p.detach().contiguous() for name, p in own.model.named_parameters() if p.requires_grad}
    save_file(adapters, folder / "adapters.safetensors")
    print(f"AdamW on the whole model would keep {8 * numel:,} bytes of state")
    path = folder / "result.json"
    versions = {"torch": torch.__version__}
    path.write_text(json.dumps({"args": asdict(args), "parameters": numel, "versions": versions, "rows": rows}, indent=1))
    return path


def main() -> None:
    try:
        print(train(parse(Args, __doc__)))
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
