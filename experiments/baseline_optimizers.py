"""The optimizers that MANGO is compared with, by name: what each is, whether it runs here, and what its state takes.

    python -m experiments.baseline_optimizers --out runs/baselines.json

trains a small transformer for a few steps with each and counts the bytes that it keeps. What cannot run on this machine is
listed with the reason. Rates are those that were best on the character GPT of `benchmarks/quality.py` where they were tuned
there, the papers' otherwise: tune them again for a comparison.

    optimizer = build_baseline("adafactor", model)
    optimizer = build_baseline("galore", model.named_parameters(), lr=0.01, rank=16)
"""

import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Generator, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.quality import config_of
from benchmarks.record import parse, stamp, write
from experiments.adarankgrad import AdaRankGrad, hidden_names
from experiments.dgc import DGC
from experiments.galore import GaLore
from experiments.graddrop import GradDrop
from experiments.joined import Joined
from experiments.run_modes import scaler_of, train_step
from mango import MANGO, CompressionConfig
from mango.critical import SGD_C, Adam_C, Adam_CM
from mango_env.workloads.initialise import build
from mango_env.workloads.text import VOCABULARY, Transformer
from train_policy.state_bytes import state_nbytes

Named = Sequence[tuple[str, Parameter]]
Builder = Callable[..., Optimizer]                       # (named parameters, lr, **options)
EXTRA = 'pip install "mango-optim[baselines]"'


@dataclass(frozen=True, slots=True)
class Baseline:
    """One optimizer to compare with, and the configuration that is recommended for it."""

    name: str
    what: str
    paper: str
    build: Builder
    lr: float                                            # recommended, for a small transformer
    options: Mapping[str, Any] = field(default_factory=dict)  # recommended, as `build` takes them
    package: str = ""                                    # on PyPI; "": torch or this repository
    imports: tuple[str, ...] = ()                        # modules that must be importable
    install: str = EXTRA
    cuda: bool = False                                   # needs a CUDA device
    amp: str = "fp32"                                    # the mode of its runs, see experiments/run_modes.py

    def requirement(self) -> str | None:
        """None where it runs on this machine, else the reason in one line."""
        if self.cuda and not torch.cuda.is_available():
            return "runs on CUDA devices only, and there is none here"
        for name in self.imports:
            top, _, attribute = name.partition(":")
            if importlib.util.find_spec(top.split(".")[0]) is None:
                return f"{top.split('.')[0]} is not installed: {self.install}"
            try:
                found = _load(top)
            except (ImportError, OSError, RuntimeError) as error:
                return f"{top} cannot be imported ({str(error).splitlines()[0]}): {self.install}"
            if attribute and not hasattr(found, attribute):
                return f"{top} {getattr(found, '__version__', torch.__version__)} has no {attribute}: {self.install}"
        return None


BASELINES: dict[str, Baseline] = {}


def register(name: str, what: str, paper: str, *, lr: float, **facts: Any) -> Callable[[Builder], Builder]:
    """Put a builder (named parameters, lr, **options) into the table."""
    if name in BASELINES:
        raise ValueError(f"baseline {name!r} is already registered: {BASELINES[name].what}")

    def add(builder: Builder) -> Builder:
        BASELINES[name] = Baseline(name, what, paper, builder, lr, **facts)
        return builder

    return add


def find(name: str) -> Baseline:
    """The baseline of a name; ValueError with the known ones for another."""
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    return BASELINES[name]


def available(name: str) -> str | None:
    """None where a baseline runs on this machine, else why it cannot, in one line."""
    return find(name).requirement()


def build_baseline(
    name: str, params: nn.Module | Iterable[tuple[str, Parameter]], lr: float | None = None, **options: Any
) -> Optimizer:
    """The optimizer of a name for a model, or for named parameters; its recommended configuration unless told otherwise.

    Raises:
        ValueError: no such baseline.
        RuntimeError: it cannot run on this machine; `available(name)` says so beforehand.
    """
    baseline = find(name)
    if (reason := baseline.requirement()) is not None:
        raise RuntimeError(f"{name}: {reason}")
    named = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        raise TypeError("give a model or its named_parameters(): some baselines treat embeddings and heads apart")
    trained = [(n, p) for n, p in named if p.requires_grad]
    return baseline.build(trained, baseline.lr if lr is None else lr, **{**baseline.options, **options})


def _load(module: str) -> ModuleType:
    """A package that need not be installed; what it warns of while it loads is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _tensors(named: Named) -> list[Parameter]:
    return [p for _, p in named]


def _split(named: Named) -> tuple[list[Parameter], list[Parameter]]:
    """The blocks' matrices, and the rest."""
    hidden = hidden_names(named)
    return [p for n, p in named if n in hidden], [p for n, p in named if n not in hidden]


# ---- in full precision -------------------------------------------------------------------------------------------------------

ADAM, ADAMW = "Kingma & Ba 2015", "Loshchilov & Hutter 2019"


@register("adam", "torch.optim.Adam in float32", ADAM, lr=3e-3)
def _adam(named: Named, lr: float, **options: Any) -> Optimizer:
    return torch.optim.Adam(_tensors(named), lr=lr, **options)


@register("adamw_amp_bf16", "AdamW in float32, forward and backward in bfloat16", "Kalamkar et al. 2019", lr=3e-3, amp="bf16")
@register("adamw_amp_fp16", "AdamW in float32, forward and backward in float16 with a scaled loss", "Micikevicius et al. 2018",
          lr=3e-3, amp="fp16")  # fmt: skip
@register("adamw", "torch.optim.AdamW in float32", ADAMW, lr=3e-3)
def _adamw(named: Named, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    return torch.optim.AdamW(_tensors(named), lr=lr, weight_decay=weight_decay, **options)


@register("sgd", "torch.optim.SGD with momentum 0.9", "Sutskever et al. 2013", lr=0.1, options={"momentum": 0.9})
def _sgd(named: Named, lr: float, **options: Any) -> Optimizer:
    return torch.optim.SGD(_tensors(named), lr=lr, **options)


@register("lion", "Lion's rule in MANGO at full precision", "Chen et al. 2023", lr=1e-3, options={"betas": (0.9, 0.99)})
def _lion(named: Named, lr: float, **options: Any) -> Optimizer:
    return MANGO(named, lr=lr, rule="lion", policy=CompressionConfig(), policy_update_freq=10**9, **options)


@register("muon", "torch.optim.Muon for the blocks' matrices, AdamW for the rest", "Jordan et al. 2024; Liu et al. 2025",
          lr=3e-3, options={"matrix_lr_scale": 4.0}, imports=("torch.optim:Muon",), install="torch 2.9 has it")  # fmt: skip
def _muon(named: Named, lr: float, matrix_lr_scale: float, momentum: float = 0.95) -> Optimizer:
    """Updates have AdamW's root mean square, so that `lr` is AdamW's and the matrices' rate a multiple of it."""
    matrices, rest = _split(named)
    parts: list[Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=lr * matrix_lr_scale, momentum=momentum, weight_decay=0.0,
                                      adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=lr, weight_decay=0.0))
    return Joined(parts)


# ---- with factored, quantised or paged state ---------------------------------------------------------------------------------


@register("adafactor", "torch.optim.Adafactor with transformers' floor of 1e-30 under the second moment",
          "Shazeer & Stern 2018, algorithms 4 and 5", lr=0.1)  # fmt: skip
def _adafactor(named: Named, lr: float, eps: tuple[float, float] = (1e-15, 1e-3), **options: Any) -> Optimizer:
    """torch squares its first eps, and by default takes float32's 1e-7 for it: rows with small gradients would hardly move."""
    return torch.optim.Adafactor(_tensors(named), lr=lr, eps=eps, weight_decay=0.0, **options)


DETTMERS, QLORA = "Dettmers et al. 2022", "Dettmers et al. 2023 (QLoRA), sec. 3"


@register("adam8bit", "bitsandbytes.optim.AdamW8bit: blocks of 256, tensors under 4,096 entries in float32", DETTMERS, lr=3e-3,
          package="bitsandbytes", imports=("bitsandbytes",))  # fmt: skip
def _adam8bit(named: Named, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    optimizer: Optimizer = _load("bitsandbytes").optim.AdamW8bit(_tensors(named), lr=lr, weight_decay=weight_decay, **options)
    return optimizer


@register("paged_adam", "bitsandbytes.optim.PagedAdamW: float32 state in unified memory, moved by page faults",
          QLORA, lr=3e-3, package="bitsandbytes", imports=("bitsandbytes",), cuda=True)  # fmt: skip
def _paged_adam(named: Named, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    optimizer: Optimizer = _load("bitsandbytes").optim.PagedAdamW(_tensors(named), lr=lr, weight_decay=weight_decay, **options)
    return optimizer


def _torchao(kind: str, named: Named, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    """Compiles a kernel per shape of a tensor at its first step: 20 seconds or more on a CPU."""
    optimizer: Optimizer = getattr(_load("torchao.optim"), kind)(_tensors(named), lr=lr, weight_decay=weight_decay, **options)
    return optimizer


register("adam8bit_torchao", "torchao.optim.AdamW8bit: compiled; tensors of no multiple of 256 entries in float32", DETTMERS,
         lr=3e-3, package="torchao", imports=("torchao.optim",))(partial(_torchao, "AdamW8bit"))  # fmt: skip
register("adam4bit", "torchao.optim.AdamW4bit: compiled; tensors of no multiple of 128 entries in float32", "Li et al. 2023",
         lr=3e-3, package="torchao", imports=("torchao.optim",))(partial(_torchao, "AdamW4bit"))  # fmt: skip


@register("flashoptim", "flashoptim.FlashAdamW: companded 8-bit moments in groups of 32", "Gonzalez Ortiz et al. 2026", lr=3e-3,
          package="flashoptim", imports=("flashoptim",), cuda=True)  # fmt: skip
def _flashoptim(named: Named, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    """Float32 parameters are their own master weights."""
    if all(p.dtype == torch.float32 for _, p in named):
        options = {"master_weight_bits": None} | options
    optimizer: Optimizer = _load("flashoptim").FlashAdamW(_tensors(named), lr=lr, weight_decay=weight_decay, **options)
    return optimizer


# ---- of low rank -------------------------------------------------------------------------------------------------------------

ZHAO = "Zhao et al. 2024, algorithm 2"


@register("galore", "GaLore as in the paper: 4 r (m + 2 n) bytes per matrix", ZHAO, lr=0.04, options={"rank": 8})
def _galore(named: Named, lr: float, **options: Any) -> Optimizer:
    return GaLore(named, lr=lr, hidden=hidden_names(named), **options)


@register("galore_torch", "GaLore's own package, which keeps all singular vectors alive", ZHAO, lr=0.04, options={"rank": 8},
          package="galore-torch", imports=("galore_torch",))  # fmt: skip
def _galore_torch(named: Named, lr: float, rank: int, every: int = 200, scale: float = 0.25, eps: float = 1e-8) -> Optimizer:
    low = {"rank": rank, "update_proj_gap": every, "scale": scale, "proj_type": "std"}
    groups = [{"params": part} | more for part, more in zip(_split(named), (low, {}), strict=True) if part]
    optimizer: Optimizer = _load("galore_torch").GaLoreAdamW(groups, lr=lr, eps=eps, no_deprecation_warning=True)
    return optimizer


@register("apollo", "APOLLO's own package: rates per channel from a random projection", "Zhu et al. 2025, algorithm 1", lr=0.02,
          options={"rank": 8}, package="apollo-torch", imports=("apollo_torch",),
          install="pip install apollo-torch (licence CC BY-NC 4.0, so no part of an extra)")  # fmt: skip
def _apollo(named: Named, lr: float, rank: int, every: int = 200, scale: float = 1.0, eps: float = 1e-8) -> Optimizer:
    low = {"rank": rank, "update_proj_gap": every, "scale": scale, "proj": "random", "proj_type": "std", "scale_type": "channel"}
    groups = [{"params": part} | more for part, more in zip(_split(named), (low, {}), strict=True) if part]
    optimizer: Optimizer = _load("apollo_torch").APOLLOAdamW(groups, lr=lr, eps=eps)
    return optimizer


@register("adarankgrad", "AdamW in subspaces whose rank falls from 8 to 2 (or falling-0.1: as the energy allows)",
          "Refael et al. 2025", lr=0.016, options={"schedule": "planned-8-2", "every": 50, "total_steps": 300})  # fmt: skip
def _adarankgrad(named: Named, lr: float, total_steps: int, every: int, seed: int = 0, **options: Any) -> Optimizer:
    """`total_steps` are those of the run, over which the rank falls."""
    return AdaRankGrad(named, lr=lr, hidden=hidden_names(named), every=every, steps=total_steps, seed=seed, **options)


# ---- with compressed gradients -----------------------------------------------------------------------------------------------


@register("dgc", "momentum SGD that applies a tenth, then a thousandth of its entries per step", "Lin et al. 2018", lr=0.03,
          options={"momentum": 0.9, "warmup": 100, "clip": 1.0})  # fmt: skip
def _dgc(named: Named, lr: float, **options: Any) -> Optimizer:
    return DGC(_tensors(named), lr=lr, **options)


@register("graddrop", "AdamW on the mean of 2 gradients, a step() each, where entries that disagree keep one sign",
          "Chen et al. 2020, algorithm 1", lr=3e-3, options={"losses": 2, "mean": True})  # fmt: skip
def _graddrop(named: Named, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    return GradDrop(torch.optim.AdamW(_tensors(named), lr=lr, weight_decay=weight_decay), **options)


# ---- MANGO, and what it makes of other methods -------------------------------------------------------------------------------


BUDGET = {"memory_budget": 0.15, "policy_update_freq": 10}  # 1.2 bytes per parameter, shared out anew every 10 steps


@register("alam", "MANGO sharing out bits of state by ALAM's sensitivity (ALAM itself compresses activations)",
          "Woo et al. 2024", lr=3e-3, options={"policy": "sensitivity", **BUDGET})  # fmt: skip
@register("mango", "MANGO: least error per byte under a budget of a fraction of AdamW's 8 bytes", "this repository", lr=3e-3,
          options={"policy": "water-filling", **BUDGET})  # fmt: skip
@register("mango_universal", "MANGO decided by the shipped policy under the same budget", "this repository", lr=3e-3,
          options={"policy": "universal", **BUDGET})  # fmt: skip
@register("mango_muon", "the same under Muon's rule", "this repository; Jordan et al. 2024", lr=3e-3,
          options={"policy": "universal", "rule": "muon", "matrix_lr_scale": 4.0, **BUDGET})  # fmt: skip
def _mango(named: Named, lr: float, **options: Any) -> Optimizer:
    return MANGO(named, lr=lr, **options)


def _mango_fixed(rung: str, named: Named, lr: float, **options: Any) -> Optimizer:
    return MANGO(named, lr=lr, policy=config_of(rung), **({"policy_update_freq": 10**9} | options))


for _rung, _what in {
    "full": "in float32",
    "m8v8": "with 8-bit moments",
    "m4v4": "with 4-bit moments",
    "m4v0": "with a 4-bit first and a factored second moment",
}.items():
    register(f"mango_{_rung}", f"MANGO {_what}", "this repository", lr=3e-3)(partial(_mango_fixed, _rung))


@register("mango_g4r4", "MANGO with 4-bit gradients, and moments of rank 4 in 4-bit factors", "this repository", lr=3e-3)
def _mango_g4r4(named: Named, lr: float, **options: Any) -> Optimizer:
    config = CompressionConfig(gradient_bits=4, rank=4, factor_bits_p=4, factor_bits_q=4, variance_bits=0)
    return MANGO(named, lr=lr, policy=config, **({"policy_update_freq": 10**9} | options))


@register("mango_paged", "MANGO in float32 with a quarter of it resident, the rest in a mapped file or pinned memory",
          QLORA, lr=3e-3, options={"memory_budget": 0.25})  # fmt: skip
def _mango_paged(named: Named, lr: float, memory_budget: float, page_to: str | Path | None = None, **options: Any) -> Optimizer:
    cuda = any(p.device.type == "cuda" for _, p in named)
    place = ("pinned" if cuda else tempfile.gettempdir()) if page_to is None else page_to
    return _mango_fixed("full", named, lr, memory_budget=memory_budget, page_to=place, **options)


# ---- with a memory of past gradients or momenta ------------------------------------------------------------------------------

CRITICAL, MOMENTA = "McRae et al. 2022", "Malviya et al. 2024"


def _critical(kind: type[Optimizer], named: Named, lr: float, **options: Any) -> Optimizer:
    return kind(_tensors(named), lr=lr, **options)  # type: ignore[call-arg]


for _name, _kind, _paper, _lr, _options in (
    ("sgd_c", SGD_C, CRITICAL, 0.1, {"momentum": 0.9, "topC": 5}),
    ("adam_c", Adam_C, CRITICAL, 3e-3, {"topC": 5}),
    ("adam_c_int8", Adam_C, CRITICAL, 3e-3, {"topC": 5, "buffer_codec": "int8"}),
    ("adam_cm", Adam_CM, MOMENTA, 3e-3, {"topC": 5}),
):
    register(_name, f"mango.critical.{_kind.__name__}, 5 items" + " of 8 bits" * (_name == "adam_c_int8"), _paper, lr=_lr,
             options=_options)(partial(_critical, _kind))  # fmt: skip


# ---- further ones go here: @register(...), with the import of what they need inside the builder ------------------------------


@dataclass(frozen=True)
class Args:
    names: str = ""                                      # comma-separated; all without
    steps: int = 3                                       # bytes are counted after each
    width: int = 128                                     # of the transformer
    depth: int = 2                                       # its blocks
    context: int = 32                                    # characters that it reads
    compiled: bool = False                               # let torchao compile: the same bytes after half a minute
    device: str = "cpu"                                  # "cpu" or "cuda"
    seed: int = 0                                        # of parameters and characters
    out: Path = Path("runs/baselines.json")


def measure(name: str, args: Args) -> dict[str, Any]:
    """What a few steps of training take: losses, and the most bytes of state per parameter after any of them."""
    generator = Generator().manual_seed(args.seed)
    model = build(partial(Transformer, args.width, args.depth, 4, args.context), generator).to(args.device)
    text = torch.randint(VOCABULARY, (4, args.context + 1), generator=generator).to(args.device)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    optimizer = build_baseline(name, model)
    mode = BASELINES[name].amp
    scaler = scaler_of(mode, args.device)
    losses, sizes = [], []
    for _ in range(args.steps):
        losses.append(train_step(optimizer, loss, scaler, mode))
        sizes.append(state_nbytes(optimizer))
    numel = sum(p.numel() for p in model.parameters())
    return {"parameters": numel, "losses": losses, "state_bytes_per_param": max(sizes) / numel}


def row(baseline: Baseline, args: Args) -> dict[str, Any]:
    """What stands in the table, and what was measured where it runs."""
    facts: dict[str, Any] = {name: getattr(baseline, name) for name in ("name", "what", "paper", "package", "lr", "amp")}
    facts |= {"options": {name: str(value) for name, value in baseline.options.items()}}
    reason = baseline.requirement()
    facts |= {"available": reason is None, "reason": reason}
    return facts if reason is not None else facts | measure(baseline.name, args)


def train(args: Args) -> Path:
    chosen = [find(name) for name in args.names.split(",") if name] or list(BASELINES.values())
    rows = []
    print(f"{'name':18s} {'package':14s} {'B/param':>8s}  what it is, or why it cannot run here")
    for baseline in chosen:
        with torch.compiler.set_stance("default" if args.compiled else "force_eager"):
            rows.append(row(baseline, args))
        bytes_ = f"{rows[-1]['state_bytes_per_param']:8.3f}" if rows[-1]["available"] else f"{'-':>8s}"
        print(f"{baseline.name:18s} {baseline.package or '-':14s} {bytes_}  {rows[-1]['reason'] or baseline.what}", flush=True)
    return write(args.out, stamp(args) | {"baselines": rows})


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
