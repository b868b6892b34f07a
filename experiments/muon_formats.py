"""Which stored format of Muon's momentum keeps Muon's loss, at how many bytes per parameter.

    python -m experiments.muon_formats --formats fp32,nf4,low8+nf4 --data source --seeds 0,1,2

Trains a character transformer with Muon on its hidden matrices and AdamW elsewhere. After every step the momentum goes
through a storage format and back; the update itself is taken before storing, as a compressed optimizer would. Runs are
appended to the results file one by one and not done twice; `--repeat` does those that are there again, and a row then says at
which commit and with what held-out loss. `--shadow` trains once in full precision and lets each
format follow the same gradients, which tells how far its update turns away from the exact one.

A format is transforms joined by "+", the last one being the code of the values, then options after "/":
  codes       fp32, bf16, none (no momentum kept); lin<bits> (2^bits - 1 even levels, absmax scale, nearest),
              dit<bits> (2^bits even levels, subtractive dither), sqrt8, nf4, nf4sr, tern (2 bit, stochastic);
              "b<block>" after a code sets the block (default 64; 128 for sqrt8)
  transforms  low<r> (rank-r part kept apart in 8 bits, low<r>q in NF4; the rest is coded), col (columns divided by their rms),
              had (random signs and a Hadamard rotation within blocks of 64), cube (singular values to the power 1/3)
  options     split (q, k, v orthogonalised apart), b<beta> (momentum), plain (not Nesterov's form),
              rms (update scale 0.2 sqrt(max(m, n))), rest4 (AdamW's m in NF4, its v factored), adamw (AdamW everywhere),
              <layer kind>=<format> (that kind stored otherwise: qkv, o, up, down),
              then<fraction>=<format> (from that fraction of the run on)
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.record import find_run, parse, stamp, write
from mango.blockwise import NF4_LEVELS
from mango.codecs import CODECS, from_blocks, safe, to_blocks
from mango_env.workloads.data import data_file
from mango_env.workloads.text import SHAKESPEARE, SHAKESPEARE_SOURCE, LanguageModel, load_source, load_text

KINDS = {"qkv": "attn.qkv", "o": "attn.out_proj", "up": "mlp.up", "down": "mlp.down"}
FINE = 4096                                                                    # bins of [-1, 1] in which a level is looked up


@dataclass(frozen=True)
class Args:
    formats: str = "fp32,nf4"                           # see above
    data: str = "source"                                # source, shakespeare
    seeds: str = "0"                                    # one run each
    lr: str = "0.02"                                    # of Muon; for /adamw formats of AdamW
    adam_lr: float = 3e-3                               # of everything that is not a hidden matrix
    steps: int = 400                                    # optimizer steps
    warmup: int = 40                                    # steps of linear warm-up, then a cosine to 10 %
    width: int = 128                                    # of the transformer
    depth: int = 3                                      # blocks
    batch: int = 16                                     # windows of 64 characters
    val_windows: int = 768                              # windows of 64 characters
    shadow: bool = False                                # compare updates instead of training each
    repeat: bool = False                                # do runs that are there again, to compare
    out: Path = Path("benchmarks/results/muon_formats.json")


# ---------------------------------------------------------------------------------------------------- codes of values


@cache
def nearest_table(levels: tuple[float, ...]) -> Tensor:
    """The nearest level for each of FINE + 1 points of [-1, 1]."""
    points, table = torch.linspace(-1, 1, FINE + 1), torch.tensor(levels)
    return table[(points[:, None] - table).abs().argmin(1)]


def snap(y: Tensor, levels: tuple[float, ...]) -> Tensor:
    places = ((y + 1) * (FINE / 2)).round_().int().reshape(-1)
    return nearest_table(levels).index_select(0, places).view(y.shape)


def lloyd_levels(bits: int) -> tuple[float, ...]:
    """Lloyd-Max levels of the normal distribution, in units of its standard deviation."""
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    levels = torch.special.ndtri((torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits))
    for _ in range(200):
        part = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        levels = torch.zeros_like(levels).index_add_(0, part, x) / torch.bincount(part, minlength=len(levels))
    return tuple(levels.tolist())


LLOYD = cache(lloyd_levels)


def code_values(x: Tensor, code: str, block: int | None, rng: Generator) -> tuple[Tensor, float]:
    """`x` as it comes back from a code, and bytes per value."""
    if code == "fp32":
        return x, 4.0
    if code == "bf16":
        return x.bfloat16().float(), 2.0
    if code == "none":
        return torch.zeros_like(x), 0.0
    if code in ("sqrt8", "nf4sr", "tern"):
        codec = CODECS[{"sqrt8": "signed8", "nf4sr": "nf4", "tern": "ternary2"}[code]]
        key = None if code == "sqrt8" else int(torch.randint(1 << 31, (), generator=rng))
        return codec.decode(codec.encode(x, key)), codec.nbytes(tuple(x.shape)) / x.numel()
    block = block or 64
    blocks = to_blocks(x, block)
    scale = safe(blocks.abs().amax(1, keepdim=True).bfloat16().float())
    bits = int(code[-1])
    size = bits / 8 + 2 / block
    if code == "nf4":
        y = snap((blocks / scale).clamp_(-1, 1), NF4_LEVELS)
    elif code.startswith("lm"):                                                # Lloyd-Max, scale from the rms
        levels = LLOYD(bits)
        top = levels[-1]
        scale = safe((blocks.square().mean(1, keepdim=True).sqrt() * top).bfloat16().float())
        y = snap((blocks / scale).clamp_(-1, 1), tuple(v / top for v in levels))
    elif code.startswith("lin"):
        top = (1 << (bits - 1)) - 1
        y = (blocks / scale * top).round_().clamp_(-top, top) / top
    elif code.startswith("dit"):
        half = 1 << (bits - 1)
        step = scale / (half - 0.5)
        if bits <= 3:                                                          # a narrower range beats a wider step
            rms = blocks.square().mean(1, keepdim=True).sqrt()
            step = safe((rms * {3: 2.2, 2: 1.5, 1: 0.9}[bits] / (half - 0.5)).bfloat16().float())
        dither = torch.rand(blocks.shape, generator=rng)                       # made again from a counter when decoding
        y = (blocks / step + dither).floor_().clamp_(-half, half - 1) + 0.5 - dither
        return from_blocks(y * step, tuple(x.shape)), size
    else:
        raise ValueError(f"unknown code {code!r}; see the head of experiments/muon_formats.py")
    return from_blocks(y * scale, tuple(x.shape)), size


# ---------------------------------------------------------------------------------------------------- transforms


@cache
def hadamard(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


def roundtrip(m: Tensor, name: str, memory: dict[str, Tensor], rng: Generator) -> tuple[Tensor, float]:
    """A matrix as it comes back from format `name`, and bytes per value. `memory` keeps a basis from call to call."""
    first, _, rest = name.partition("+")
    rows, columns = m.shape
    n = m.numel()
    if not rest:
        found = re.fullmatch(
            r"([a-z]+(?:(?<=lin|dit)\d|(?<=lm)\d|(?<=nf)4|(?<=sqrt)8|(?<=fp)32|(?<=bf)16)?(?:sr)?)(?:b(\d+))?", name
        )
        if found is None:
            raise ValueError(f"unknown code {name!r}; see the module's docstring")
        code, block = found.groups()
        return code_values(m, code, int(block) if block else None, rng)
    if first.startswith("low"):
        rank, factor_code = int(first[3:].removesuffix("q")), "nf4" if first.endswith("q") else "lin8"
        old = memory.get("right")
        if old is None:
            old = torch.randn(columns, rank, generator=rng)
        left = torch.linalg.qr(m @ old).Q                                      # one power iteration from the last basis
        left8, size_left = code_values(left.T.contiguous(), factor_code, 64 if rows % 128 else 128, rng)
        if factor_code == "nf4":                                               # the best right factor for the left one as stored
            left = torch.linalg.solve(left8 @ left8.T, left8).T
        right8, size_right = code_values((left.T @ m).contiguous(), factor_code, 128, rng)
        memory["right"] = right8.T.contiguous()
        kept = left8.T @ right8
        back, size = roundtrip(m - kept, rest, memory, rng)
        return kept + back, size + rank * (rows * size_left + columns * size_right) / n
    if first == "col":
        scale = safe(m.square().mean(0).sqrt().bfloat16().float())
        back, size = roundtrip(m / scale, rest, memory, rng)
        return back * scale, size + 2 * columns / n
    if first == "had":
        if "signs" not in memory:
            memory["signs"] = torch.randint(0, 2, m.shape, generator=rng) * 2.0 - 1
        turned = ((m * memory["signs"]).view(-1, 64) @ hadamard(64)).view(m.shape)
        back, size = roundtrip(turned, rest, memory, rng)
        return (back.view(-1, 64) @ hadamard(64)).view(m.shape) * memory["signs"], size
    if first == "cube":
        wide = m if rows <= columns else m.T
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        power = values.clamp(min=float(values[-1]) * 1e-9 + 1e-30).pow(-1 / 3)
        rooted = vectors @ (power[:, None] * (vectors.T @ wide))
        back, size = roundtrip(rooted.contiguous(), rest, memory, rng)
        cubed = (back @ back.T) @ back
        surplus = ((cubed - wide) * back).sum() / back.square().sum()          # noise makes the cube too large: one float32
        cubed = cubed - surplus * back
        return (cubed if rows <= columns else cubed.T).contiguous(), size + 4 / n
    raise ValueError(f"unknown transform {first!r} in {name!r}")


# ---------------------------------------------------------------------------------------------------- Muon


def orthogonalise(u: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps in bfloat16 (Jordan et al. 2024)."""
    x = u.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    y: Tensor = (x.T if tall else x).float()
    return y


@dataclass
class Plan:
    """A format's name taken apart."""

    base: str
    kinds: dict[str, str]
    then: tuple[float, str] | None
    flags: set[str]
    beta: float

    @classmethod
    def parse(cls, name: str) -> "Plan":
        base, *options = name.split("/")
        kinds, then, flags, beta = {}, None, set(), 0.95
        for option in options:
            key, _, value = option.partition("=")
            if key in KINDS and value:
                kinds[key] = value
            elif key.startswith("then"):
                then = float(key[4:]), value
            elif re.fullmatch(r"b[\d.]+", option):
                beta = float(option[1:])
            elif option in ("split", "rms", "rest4", "adamw", "plain"):
                flags.add(option)
            else:
                raise ValueError(f"unknown option {option!r} in {name!r}")
        return cls(base, kinds, then, flags, beta)

    def at(self, kind: str, progress: float) -> str:
        if self.then and progress >= self.then[0]:
            return self.then[1]
        return self.kinds.get(kind, self.base)


class Muon:
    """Muon with a stored format on the hidden matrices, AdamW elsewhere."""

    def __init__(self, model: nn.Module, plan: Plan, lr: float, adam_lr: float, seed: int) -> None:
        self.plan, self.lr, self.adam_lr = plan, lr, adam_lr
        self.rng = Generator().manual_seed(1000 + seed)
        self.hidden: list[tuple[str, nn.Parameter]] = []
        self.other: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            kind = next((k for k, part in KINDS.items() if name.endswith(f"{part}.weight")), None)
            if kind and "adamw" not in plan.flags:
                self.hidden.append((kind, p))
            else:
                self.other.append(p)
        self.momenta = [torch.zeros_like(p) for _, p in self.hidden]
        self.memory: list[dict[str, Tensor]] = [{} for _ in self.hidden]
        self.m = [torch.zeros_like(p) for p in self.other]
        self.v = [torch.zeros_like(p) for p in self.other]
        self.count = 0
        self.stored = 0.0
        self.format_of_adam = plan.base if "adamw" in plan.flags else "nf4" if "rest4" in plan.flags else "fp32"

    @torch.no_grad()
    def step(self, factor: float, progress: float) -> None:
        self.count += 1
        self.stored = 0.0
        beta = self.plan.beta
        for i, (kind, p) in enumerate(self.hidden):
            grad = p.grad
            assert grad is not None
            m = self.momenta[i].lerp(grad, 1 - beta)
            p.sub_(self.direction(kind, m if "plain" in self.plan.flags else grad.lerp(m, beta)), alpha=self.lr * factor)
            self.momenta[i], size = roundtrip(m, self.plan.at(kind, progress), self.memory[i], self.rng)
            self.stored += size * p.numel()
        lr = (self.lr if "adamw" in self.plan.flags else self.adam_lr) * factor
        for i, p in enumerate(self.other):
            self._adamw(i, p, lr)

    def direction(self, kind: str, u: Tensor) -> Tensor:
        rows, columns = u.shape
        if kind == "qkv" and "split" in self.plan.flags:
            return torch.cat([self.direction("", part) for part in u.chunk(3)])
        scale = 0.2 * math.sqrt(max(rows, columns)) if "rms" in self.plan.flags else math.sqrt(max(1, rows / columns))
        return orthogonalise(u) * scale

    def _adamw(self, i: int, p: Tensor, lr: float) -> None:
        b1, b2 = 0.9, 0.999
        grad = p.grad
        assert grad is not None
        m, v = self.m[i].lerp_(grad, 1 - b1), self.v[i].lerp_(grad * grad, 1 - b2)
        denominator = (v / (1 - b2**self.count)).sqrt_().add_(1e-8)
        p.addcdiv_(m, denominator, value=-lr / (1 - b1**self.count))
        if self.format_of_adam != "fp32" and p.numel() >= 4096:
            memory: dict[str, Tensor] = {}
            self.m[i] = roundtrip(m, self.format_of_adam, memory, self.rng)[0] if p.ndim == 2 else m
            if p.ndim == 2:
                factored = CODECS["factored"]
                self.v[i] = factored.decode(factored.encode(v))

    def per_param(self) -> float:
        """Bytes of momentum per hidden parameter."""
        return self.stored / max(1, sum(p.numel() for _, p in self.hidden))

    def total_per_param(self) -> float:
        """Bytes of all state per parameter, AdamW's part being NF4 and factored for matrices, 8 bytes for vectors."""
        rest = 0.0
        for p in self.other:
            if p.ndim == 2 and p.numel() >= 4096:
                rest += CODECS["nf4"].nbytes(tuple(p.shape)) + CODECS["factored"].nbytes(tuple(p.shape))
            else:
                rest += 8 * p.numel()
        return (self.stored + rest) / (sum(p.numel() for p in self.other) + sum(p.numel() for _, p in self.hidden))


# ---------------------------------------------------------------------------------------------------- runs


def task(args: Args, seed: int, data: str) -> LanguageModel:
    text = load_source() if data == "source" else load_text(data_file(SHAKESPEARE, "shakespeare_lm", SHAKESPEARE_SOURCE))
    sizes = {"steps": args.steps, "batch": args.batch, "width": args.width, "depth": args.depth}
    return LanguageModel(text, seed, context=64, heads=4, lr=0.0, **sizes)


@torch.no_grad()
def evaluate(lm: LanguageModel, windows: int) -> float:
    starts = torch.linspace(0, len(lm._data.val) - 66, windows, dtype=torch.float64).long()
    parts = torch.split(lm._windows(lm._data.val, starts), 64)
    return sum(float(lm._cross_entropy(part)) * len(part) for part in parts) / windows


def schedule(args: Args, step: int) -> float:
    if step < args.warmup:
        return (step + 1) / args.warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - args.warmup) / (args.steps - args.warmup)))


def descend(args: Args, lm: LanguageModel, optimizer: Muon, watch: Callable[[int], None] | None = None) -> float:
    """Train; the mean training loss of the last 20 steps."""
    losses = []
    for step in range(args.steps):
        loss = lm.loss()
        for p in lm.model.parameters():
            p.grad = None
        loss.backward()                                                        # type: ignore[no-untyped-call]
        if watch:
            watch(step)
        optimizer.step(schedule(args, step), step / args.steps)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
    return sum(losses[-20:]) / 20


def run(args: Args, name: str, data: str, lr: float, seed: int) -> dict[str, Any]:
    begun = time.perf_counter()
    lm = task(args, seed, data)
    optimizer = Muon(lm.model, Plan.parse(name), lr, args.adam_lr, seed)
    train_loss = descend(args, lm, optimizer)
    return {
        "format": name, "data": data, "lr": lr, "adam_lr": args.adam_lr, "seed": seed, "steps": args.steps, "width": args.width,
        "val_loss": evaluate(lm, args.val_windows), "train_loss": train_loss, "momentum_bytes_per_param": optimizer.per_param(),
        "state_bytes_per_param": optimizer.total_per_param(), "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def shadow(args: Args, names: list[str], data: str, lr: float, seed: int) -> dict[str, Any]:
    """Each format follows the gradients of one full-precision run: error of its momentum, and of the update made of it."""
    lm = task(args, seed, data)
    exact = Muon(lm.model, Plan.parse("fp32"), lr, args.adam_lr, seed)
    plans = {name: Plan.parse(name) for name in names}
    state = {name: [torch.zeros_like(p) for _, p in exact.hidden] for name in names}
    memory: dict[str, list[dict[str, Tensor]]] = {name: [{} for _ in exact.hidden] for name in names}
    rng = Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    looks = {round(args.steps * f) - 1 for f in (0.1, 0.25, 0.5, 1.0)}

    @torch.no_grad()
    def watch(step: int) -> None:
        for i, (kind, p) in enumerate(exact.hidden):
            grad = p.grad
            assert grad is not None
            m = exact.momenta[i].lerp(grad, 0.05)
            if step in looks:
                u = grad.lerp(m, 0.95)
                true = exact.direction(kind, u)
                s = torch.linalg.svdvals(m)
                rows.append({"step": step, "kind": kind, "layer": i // 4, "stable_rank": float((s**2).sum() / s[0] ** 2),
                             "top8_energy": float((s[:8] ** 2).sum() / (s**2).sum()), "condition": float(s[0] / s[-1]),
                             "grad_over_m": float(grad.norm() / m.norm())})  # fmt: skip
            for name in names:
                mine = state[name][i].lerp(grad, 0.05)
                if step in looks:
                    update = exact.direction(kind, grad.lerp(mine, 0.95))
                    cosine = F.cosine_similarity(update.flatten(), true.flatten(), 0)
                    rows[-1][name] = {"momentum_error": float((mine - m).norm() / m.norm()), "update_cosine": float(cosine)}
                state[name][i] = roundtrip(mine, plans[name].at(kind, step / args.steps), memory[name][i], rng)[0]

    descend(args, lm, exact, watch)
    return {"shadow": True, "data": data, "seed": seed, "lr": lr, "steps": args.steps, "rows": rows}


def train(args: Args) -> Path:
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    runs, shadows = known.get("runs", []), known.get("shadows", [])

    head = stamp(args)

    def save() -> None:
        write(args.out, known | head | {"runs": runs, "shadows": shadows})

    names = args.formats.split(",")
    for data in args.data.split(","):
        for seed in map(int, args.seeds.split(",")):
            for lr in map(float, args.lr.split(",")):
                if args.shadow:
                    shadows.append(shadow(args, names, data, lr, seed))
                    save()
                    continue
                for name in names:
                    key = {"format": name, "data": data, "lr": lr, "adam_lr": args.adam_lr, "seed": seed, "steps": args.steps,
                           "width": args.width}  # fmt: skip
                    before = find_run(runs, key)
                    if before and not args.repeat:
                        continue
                    row = run(args, name, data, lr, seed)
                    if before:
                        before["repeated"] = {"commit": head["commit"], "val_loss": row["val_loss"]}
                    else:
                        runs.append(row)
                    save()
                    print(f"{data:11s} {name:44s} lr {lr:<7g} seed {seed}  {row['momentum_bytes_per_param']:6.3f} B"
                          f"  total {row['state_bytes_per_param']:6.3f} B  val {row['val_loss']:.4f}", flush=True)  # fmt: skip
    return args.out


def main() -> None:
    print(train(parse(Args, __doc__)))


if __name__ == "__main__":
    main()
