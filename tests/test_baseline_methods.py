"""Promises of the methods without a kept package, and of those that are put together here: each is what its paper says."""

import copy
import importlib
import importlib.util
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from experiments.adarankgrad import AdaRankGrad, planned_rank
from experiments.baseline_optimizers import EXTRA, build_baseline
from experiments.dgc import DGC, density_at, largest
from experiments.galore import GaLore, galore_nbytes
from experiments.graddrop import GradDrop, keep_probability, pick_sign
from experiments.joined import Joined
from experiments.run_modes import scaler_of, train_step
from mango.lowrank import matricise
from mango_env.workloads.text import VOCABULARY
from tests.test_baselines import needs, next_symbol_loss, of_a_peer, tiny
from tests.test_lowrank import literal_galore
from train_policy.state_bytes import state_nbytes

# ---- E7: GradDrop ------------------------------------------------------------------------------------------------------------


def literal_graddrop(gradients: Tensor, draws: Tensor, leak: float) -> Tensor:
    """Algorithm 1 of Chen et al. 2020, entry by entry and loss by loss."""
    out = torch.zeros(gradients.shape[1:])
    for place in range(out.numel()):
        g, u = gradients.flatten(1)[:, place].tolist(), float(draws.flatten()[place])
        size = sum(abs(x) for x in g)
        p = 0.5 * (1 + sum(g) / size) if size else 0.5
        kept = [(p > u) * (x > 0) + (p < u) * (x < 0) for x in g]
        out.view(-1)[place] = sum((leak + (1 - leak) * mask) * x for mask, x in zip(kept, g, strict=True))
    return out


def test_e7_graddrop_keeps_a_sign_with_the_probability_of_equation_1() -> None:
    generator = Generator().manual_seed(0)
    gradients = torch.randn(3, 5, 4, generator=generator)
    gradients[:, 0, 0] = 0.0                                        # a dead entry
    gradients[:, 0, 1].abs_()                                       # one on which all agree
    p = keep_probability(gradients)
    sums = gradients.sum(0) / gradients.abs().sum(0)
    torch.testing.assert_close(p[1:], 0.5 * (1 + sums[1:]))
    assert p[0, 0] == 0.5 and p[0, 1] == 1.0
    positive, negative = gradients.clamp(min=0).sum(0), gradients.clamp(max=0).sum(0)
    draws = torch.rand(20_000, 5, 4, generator=generator)
    picked = pick_sign(positive, negative, draws)
    assert (picked[:, 0, 0] == 0).all() and (picked[:, 0, 1] == positive[0, 1]).all()
    share = (picked > 0).float().mean(0)
    spread = 5 * (p * (1 - p) / len(draws)).sqrt()                  # of a binomial share: 1 in 1.7 million falls outside
    alive = gradients.abs().sum(0) > 0
    assert ((share - p).abs() <= spread + 1e-7)[alive].all()


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_e7_graddrop_from_two_sums_is_algorithm_1_on_all_gradients(leak: float) -> None:
    generator = Generator().manual_seed(1)
    weight = nn.Parameter(torch.zeros(6, 3))
    optimizer = GradDrop(torch.optim.SGD([weight], lr=1.0), leak=leak, seed=7)
    gradients = torch.randn(4, 6, 3, generator=generator)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.collect()
    optimizer.step()
    draws = torch.rand(6, 3, generator=Generator().manual_seed(7))
    torch.testing.assert_close(-weight.detach(), literal_graddrop(gradients, draws, leak))


def test_graddrop_over_micro_batches_moves_at_every_second_step_and_counts_what_it_holds() -> None:
    weight = nn.Parameter(torch.zeros(10))
    optimizer = GradDrop(torch.optim.SGD([weight], lr=1.0), losses=2, mean=True)
    assert state_nbytes(optimizer) == 0
    weight.grad = torch.ones(10)
    optimizer.step()
    optimizer.zero_grad()
    assert (weight == 0).all() and state_nbytes(optimizer) == 80
    weight.grad = torch.full((10,), 3.0)
    optimizer.step()
    assert (weight == -2).all() and state_nbytes(optimizer) == 0


# ---- E8: Deep Gradient Compression -------------------------------------------------------------------------------------------


def test_e8_dgc_applies_a_tenth_then_a_thousandth_of_the_entries() -> None:
    densities = [density_at(step, 100) for step in range(150)]
    assert densities[0] == 0.1 and densities[100:] == [pytest.approx(0.001)] * 50
    ratios = [b / a for a, b in pairwise(densities[:101])]
    assert ratios == [pytest.approx(0.01 ** (1 / 100))] * 100      # each step by the same factor
    weight = nn.Parameter(torch.zeros(2000))
    optimizer = DGC([weight], lr=1.0, warmup=4)
    for step in range(6):
        before = weight.detach().clone()
        weight.grad = torch.randn(2000, generator=Generator().manual_seed(step))
        optimizer.step()
        assert int((weight != before).sum()) == round(2000 * densities[0] * 0.01 ** min(1.0, step / 4))


def test_e8_dgc_is_momentum_correction_local_accumulation_and_factor_masking() -> None:
    """Lin et al. 2018, algorithm 4, line by line, with the clipping of its section 3.2 among four workers."""
    generator = Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(50, generator=generator))
    optimizer = DGC([weight], lr=0.1, momentum=0.9, first_density=0.2, density=0.1, warmup=3, clip=1.0, workers=4)
    w, u, v = weight.detach().clone(), torch.zeros(50), torch.zeros(50)
    for step in range(6):
        g = torch.randn(50, generator=generator)
        weight.grad = g.clone()
        optimizer.step()
        g = g * min(1.0, 0.5 / float(g.norm()))
        u = 0.9 * u + g
        v = v + u
        count = max(1, math.floor(density_at(step, 3, 0.2, 0.1) * 50 + 0.5))
        mask = v.abs() >= v.abs().sort(descending=True).values[count - 1]
        w, u, v = w - 0.1 * v * mask, u * ~mask, v * ~mask
        torch.testing.assert_close(weight.detach(), w)
    assert state_nbytes(optimizer) == 8 * 50


def test_e8_dgc_converges() -> None:
    """Least squares with 500 unknowns, of which one moves per step once it is warm: the loss falls to a thousandth."""
    generator = Generator().manual_seed(0)
    inputs = torch.randn(4000, 500, generator=generator)
    curvature, wanted = inputs.T @ inputs / 4000, torch.randn(500, 1, generator=generator)
    weight = nn.Parameter(torch.zeros(500, 1))
    optimizer = DGC([weight], lr=2e-4, warmup=100)
    losses = []
    for _ in range(3000):
        away = weight.detach() - wanted
        weight.grad = 2 * curvature @ away
        losses.append(float(away.T @ curvature @ away))
        optimizer.step()
    assert optimizer.density == pytest.approx(0.001) and losses[-1] < 1e-3 * losses[0]


def test_dgc_sends_what_it_applies_resumes_where_it_was_and_refuses_nonsense() -> None:
    sent: list[Tensor] = []

    def exchange(x: Tensor) -> Tensor:
        sent.append(x)
        return x / 2

    weight, other = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(40))
    optimizer, resumed = DGC([weight], lr=1.0, exchange=exchange, warmup=3), DGC([other], lr=1.0, warmup=3)
    weight.grad = torch.arange(40.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), 1 - sent[0] / 2)
    assert torch.equal(sent[0], largest(torch.arange(40.0), 0.1)) and int((sent[0] != 0).sum()) == 4
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.density == optimizer.density < 0.1
    assert torch.equal(resumed.state[other]["pending"], torch.arange(40.0) - sent[0])
    for wrong in ({"density": 0.2}, {"clip": 0.0}, {"workers": 0}, {"first_density": 2.0}):
        with pytest.raises(ValueError):
            DGC([weight], lr=1.0, **wrong)


# ---- E10: Adafactor ----------------------------------------------------------------------------------------------------------


def literal_adafactor(weight: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Algorithms 4 (matrices) and 5 (vectors) of Shazeer & Stern 2018 with its section 6 and 7: float64, line by line."""
    x, floor = weight.double(), 1e-30
    rows, columns, v = (torch.zeros(()).double() for _ in range(3))
    for t, gradient in enumerate((g.double() for g in gradients), 1):
        beta2 = 1 - t**-0.8
        rate = max(1e-3, float(x.square().mean().sqrt())) * min(lr, 1 / math.sqrt(t))
        square = gradient.square() + floor
        if x.dim() == 2:
            rows = beta2 * rows + (1 - beta2) * square.sum(1)       # (n,)
            columns = beta2 * columns + (1 - beta2) * square.sum(0)  # (m,)
            second = torch.outer(rows, columns) / rows.sum()
        else:
            v = beta2 * v + (1 - beta2) * square
            second = v
        update = gradient / second.sqrt()
        x = x - rate * update / max(1.0, float(update.square().mean().sqrt()))
    return x


def trained_on(optimizer: Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def gradients_of(shape: tuple[int, ...], size: float) -> list[Tensor]:
    generator = Generator().manual_seed(3)
    gradients = [size * torch.randn(shape, generator=generator) * torch.rand(shape[-1], generator=generator) for _ in range(20)]
    for gradient in gradients:
        gradient[:2] = 0.0                                          # rows that no example reaches, as in an embedding
    return gradients


CASES = [((30, 20), 1.0), ((20, 30), 1e-3), ((16, 16), 1e-6), ((40,), 1e-2)]


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_e10_adafactor_is_the_papers_formula(shape: tuple[int, ...], size: float) -> None:
    start, gradients = torch.randn(shape, generator=Generator().manual_seed(4)), gradients_of(shape, size)
    weight = nn.Parameter(start.clone())
    ours = trained_on(build_baseline("adafactor", [("weight", weight)], lr=0.01), weight, gradients)
    torch.testing.assert_close(ours.double(), literal_adafactor(start, gradients, 0.01), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_e10_adafactor_matches_transformers_to_1e_5(shape: tuple[int, ...], size: float) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip(f"transformers is not installed: {EXTRA}")
    with of_a_peer():
        theirs = importlib.import_module("transformers.optimization").Adafactor
    start, gradients = torch.randn(shape, generator=Generator().manual_seed(4)), gradients_of(shape, size)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = trained_on(build_baseline("adafactor", [("weight", one)], lr=0.01), one, gradients)
    told = trained_on(theirs([other], scale_parameter=True, relative_step=True, warmup_init=False), other, gradients)
    torch.testing.assert_close(ours, told, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours, start)


# ---- E11: GaLore -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_e11_galore_is_algorithm_2_and_takes_4_r_m_plus_2_n_bytes(shape: tuple[int, int]) -> None:
    generator = Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = GaLore([("weight", weight)], lr=0.01, hidden={"weight"}, rank=4, every=3)
    theirs, m, v = matricise(weight).double(), torch.zeros(4, 40).double(), torch.zeros(4, 40).double()
    for step in range(1, 8):                                        # three subspaces
        grad = torch.randn(shape, generator=generator)
        weight.grad = grad.clone()
        optimizer.step()
        if step % 3 == 1:
            p = torch.linalg.svd(matricise(grad), full_matrices=False).U[:, :4]
        torch.testing.assert_close(optimizer.state[weight]["projector"].abs(), p.abs(), rtol=1e-4, atol=1e-5)
        own = optimizer.state[weight]["projector"].double()         # signs of singular vectors are free
        theirs = literal_galore(theirs, matricise(grad).double(), own, m, v, step, 1e-8, 0.25)
        torch.testing.assert_close(matricise(weight).double(), theirs, rtol=1e-5, atol=1e-6)
    assert state_nbytes(optimizer) == galore_nbytes(*shape, 4) == 4 * 4 * (24 + 2 * 40)


# ---- E12: AdaRankGrad --------------------------------------------------------------------------------------------------------


def test_e12_adarankgrads_rank_falls_from_8_to_2_over_the_schedule() -> None:
    assert [planned_rank(turn, 5, 8, 2) for turn in range(5)] == [8, 6, 4, 3, 2]
    model, generator = nn.Linear(32, 24), Generator().manual_seed(0)
    optimizer = build_baseline("adarankgrad", model, total_steps=50, every=10)
    assert isinstance(optimizer, AdaRankGrad)
    optimizer.hidden = {"weight"}                                   # a single layer would count as a head
    ranks, sizes = [], []
    for _ in range(50):
        model.weight.grad = torch.randn(24, 32, generator=generator)
        model.bias.grad = torch.randn(24, generator=generator)
        optimizer.step()
        ranks.append(optimizer.ranks()["weight"])
        sizes.append(state_nbytes(optimizer))
    assert ranks == sorted(ranks, reverse=True) and (ranks[0], ranks[-1]) == (8, 2) and len(set(ranks)) == 5
    assert sizes == [4 * rank * (24 + 2 * 32) + 8 * 24 for rank in ranks]


def test_e12_by_energy_the_rank_falls_as_the_gradients_does() -> None:
    generator, weight = Generator().manual_seed(0), nn.Parameter(torch.zeros(24, 32))
    optimizer = AdaRankGrad([("weight", weight)], lr=0.01, hidden={"weight"}, schedule="falling-0.01", every=1, seed=0)
    ranks = []
    for rank in (8, 4, 2, 8):
        basis = torch.linalg.qr(torch.randn(24, rank, generator=generator)).Q
        weight.grad = basis @ torch.linalg.qr(torch.randn(32, rank, generator=generator)).Q.T
        optimizer.step()
        ranks.append(optimizer.ranks()["weight"])
    assert ranks == [8, 4, 2, 2]
    for wrong, match in (("rising-1", "none of"), ("planned-8", "none of"), ("planned-8-2", "steps=")):
        with pytest.raises(ValueError, match=match):
            AdaRankGrad([("weight", weight)], lr=0.01, hidden=set(), schedule=wrong, every=1, seed=0)
    with pytest.raises(ValueError, match="do not fall"):
        planned_rank(0, 5, 2, 8)


# ---- Lion, Muon, several as one ----------------------------------------------------------------------------------------------


def test_lion_is_the_papers_algorithm_2() -> None:
    generator = Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 32, generator=generator))
    optimizer = build_baseline("lion", [("weight", weight)], lr=0.01)
    w, m = weight.detach().clone(), torch.zeros(64, 32)
    for _ in range(5):
        weight.grad = torch.randn(64, 32, generator=generator)
        g = weight.grad.clone()
        optimizer.step()
        w, m = w - 0.01 * torch.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g
        torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-6)


def test_muon_takes_the_blocks_matrices_and_resumes_bit_for_bit() -> None:
    needs("muon")
    models = tiny(), tiny()
    optimizers = [build_baseline("muon", model) for model in models]
    joined = optimizers[0]
    assert isinstance(joined, Joined) and len(joined.param_groups[0]["params"]) == 4 and joined.param_groups[0]["lr"] == 4 * 3e-3
    text = torch.randint(VOCABULARY, (4, 17), generator=Generator().manual_seed(0))

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        train_step(optimizer, partial(next_symbol_loss, model, text), scaler_of("fp32"), "fp32")

    for _ in range(3):
        step(models[0], joined)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(joined.state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    with pytest.raises(ValueError, match="in two optimizers"):
        Joined([torch.optim.SGD(models[0].parameters()), torch.optim.SGD(models[0].parameters())])


