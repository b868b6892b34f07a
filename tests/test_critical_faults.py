"""Promises of the memory where gradients are not finite, layouts unusual, and decisions stay on a device."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from mango import critical
from mango.critical import SGD_C, Adam_C
from mango.critical_buffer import Books, CriticalBuffer, beside
from tests.test_critical import CLASSES, VANILLA, apart, each, moved, params_of, run

BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])


def stored(optimizer: Any, params: list[Parameter]) -> list[torch.Tensor]:
    buffers: list[CriticalBuffer] = [optimizer.state[p]["critical"] for p in params]
    sums = [buffer.running for buffer in buffers if buffer.running is not None]
    return [*sums, *(buffer.item(slot) for buffer in buffers for slot in range(len(buffer.keys)))]


@BAD
@each
@pytest.mark.parametrize("options", [{}, {"synced": False}, {"buffer_codec": "int8"}, {"critical_test": 1.0}])
def test_a_gradient_that_is_not_finite_is_never_stored(name: str, bad: float, options: dict[str, Any]) -> None:
    """Neither the first, nor while the buffer fills, nor when it is full; nor what it leaves behind in a momentum."""
    params = params_of((6, 5), (5,))
    optimizer = CLASSES[name](params, topC=6, weight_decay=0.1, **options)
    for step in range(12):
        run(optimizer, params, range(step, step + 1))
        if step in (0, 3, 9):
            kept = [p.detach().clone() for p in params]
            assert params[0].grad is not None
            params[0].grad[0, 0] = bad
            optimizer.step()
            with torch.no_grad():
                [p.copy_(before) for p, before in zip(params, kept, strict=True)]
        assert all(item.isfinite().all() for item in stored(optimizer, params))


@each
def test_a_gradient_that_is_not_finite_does_to_parameters_what_torch_s_does(name: str) -> None:
    mine, theirs = params_of((5,)), params_of((5,))
    for optimizer, params in ((CLASSES[name](mine), mine), (VANILLA[name](theirs), theirs)):
        run(optimizer, params, range(3))
        assert params[0].grad is not None
        params[0].grad[2] = float("nan")
        optimizer.step()
    assert torch.equal(mine[0].isnan(), theirs[0].isnan()) and mine[0].isnan().sum() == 1


def test_sgd_recovers_once_the_weights_are_restored() -> None:
    params = params_of((5,))
    optimizer = SGD_C(params, topC=3)
    params[0].grad = torch.full((5,), float("nan"))
    optimizer.step()
    with torch.no_grad():
        params[0].fill_(1.0)
    assert all(p.isfinite().all() for p in run(optimizer, params, range(10)))


def test_of_a_group_whose_priority_is_not_finite_nothing_is_stored_and_layer_wise_the_rest_is() -> None:
    for synced, kept in ((True, 0), (False, 1)):
        params = params_of((5,), (5,))
        optimizer = SGD_C(params, synced=synced)
        params[0].grad, params[1].grad = torch.full((5,), float("nan")), torch.ones(5)
        optimizer.step()
        assert [int((optimizer.state[p]["critical"].ages > 0).sum()) for p in params] == [0, kept]


def test_gradients_of_zero_do_not_displace_anything() -> None:
    params = params_of((5,))
    optimizer = Adam_C(params, topC=2, decay=0.0)
    run(optimizer, params, range(2))
    before = [item.clone() for item in stored(optimizer, params)]
    params[0].grad = torch.zeros(5)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, stored(optimizer, params), strict=True))


@each
def test_any_layout_and_shape_moves_as_the_same_numbers_in_a_row_do(name: str) -> None:
    plain, odd = params_of((4, 3, 2, 2)), params_of((4, 3, 2, 2))
    odd[0].data = odd[0].data.to(memory_format=torch.channels_last)
    assert apart(run(CLASSES[name](plain), plain, range(15)), run(CLASSES[name](odd), odd, range(15))) < 1e-6
    small = [Parameter(torch.ones(())), Parameter(torch.ones(0, 3)), Parameter(torch.ones(1, 1))]
    assert all(p.isfinite().all() for p in run(CLASSES[name](small, buffer_codec="int8"), small, range(15)))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype_train_alike(name: str, dtype: torch.dtype) -> None:
    """bfloat16 within its rounding; state and items are of the parameter's dtype, as torch's are."""
    params = params_of((6, 5), (5,), dtype=dtype)
    optimizer = CLASSES[name](params)
    start = [p.detach() for p in params_of((6, 5), (5,))]
    ends = run(optimizer, params, range(20))
    assert optimizer.state[params[0]]["critical"].rows["values"].dtype == ends[0].dtype == dtype
    gone = max(float((a - b).abs().max()) for a, b in zip(moved(name, 20), start, strict=True))
    assert apart(ends, moved(name, 20)) < (0.1 + gone if dtype == torch.bfloat16 else 1e-5)


def test_mixed_dtypes_share_a_group() -> None:
    params = [*params_of((6, 5)), *params_of((5,), dtype=torch.bfloat16), *params_of((3,), dtype=torch.float64)]
    ends = run(Adam_C(params, topC=2), params, range(10))
    assert [p.dtype for p in ends] == [torch.float32, torch.bfloat16, torch.float64]


def test_sparse_and_complex_gradients_are_refused_by_a_clear_line() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = Adam_C(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(TypeError, match="view_as_real"):
        Adam_C([Parameter(torch.ones(2, dtype=torch.complex64))])


def test_topC_cannot_change_once_there_are_items() -> None:
    params = params_of((5,))
    optimizer = Adam_C(params, topC=3)
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["topC"] = 4
    with pytest.raises(ValueError, match="fixed by the first step"):
        optimizer.step()


def test_kappa_may_change_while_training() -> None:
    params = params_of((5,))
    optimizer = Adam_C(params, kappa=0.0)
    run(optimizer, params, range(5))
    optimizer.param_groups[0]["kappa"] = 1.0
    run(optimizer, params, range(5, 10))
    assert int((optimizer.state[params[0]]["critical"].ages > 0).sum()) == 5


@each
@pytest.mark.parametrize("options", [
    {}, {"aggr": "mid", "running_sum": False}, {"buffer_dtype": torch.bfloat16, "running_sum": False}, {"buffer_codec": "int8"},
    {"critical_test": 0.5},
])  # fmt: skip
def test_what_a_gpu_runs_gives_what_the_cpu_runs(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions stay tensors there. Nothing asks them for a number: `Tensor.item` and the like fail in this test."""
    options = {"topC": 4, "lr": 0.01, "decay": 0.9} | options
    expected = moved(name, 40, **options)

    def refuse(*_: Any) -> None:
        raise AssertionError("a GPU would be waited for")

    def as_on_a_gpu(values: torch.Tensor, tensors: Any) -> list[Any]:
        return list(values.unbind())

    params = params_of((6, 5), (5,))
    optimizer = CLASSES[name](params, **options)
    monkeypatch.setattr(critical, "beside", as_on_a_gpu)
    step = optimizer._recall

    def watched(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            for ask in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
                patch.setattr(torch.Tensor, ask, refuse)
            return step(*args)

    optimizer._recall = watched
    assert apart(run(optimizer, params, range(40)), expected) < 1e-5


def test_decisions_over_many_tensors_are_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    params = params_of((4,), (4,), (4,))
    one, alone = ([CriticalBuffer.of(p, None, 3) for p in params] for _ in range(2))
    for _ in range(30):
        priority, fit = torch.rand(3, generator=generator), torch.rand(3, generator=generator) < 0.9
        by_age = torch.rand(3, generator=generator) < 0.3
        books = Books.of(one)
        slots, takes = books.admit(priority, fit, by_age)
        books.decay(0.8)
        books.file(one)
        for i, buffer in enumerate(alone):
            own = Books.of([buffer])
            slot, take = own.admit(priority[i : i + 1], fit[i : i + 1], by_age[i : i + 1])
            own.decay(0.8)
            own.file([buffer])
            assert (slot, take) == (slots[i], takes[i]) and torch.equal(buffer.keys, one[i].keys)
    assert beside(torch.tensor([1.5, 2.0]), params[:2]) == [1.5, 2.0]
