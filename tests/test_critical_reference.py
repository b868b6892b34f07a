"""With `compatible=`, the memory-augmented optimizers do exactly what the public packages did, mistakes included."""

import pytest

from tests.critical_reference import Trajectory, difference, everything, folder, some, tolerance

FIXTURE = list(some())


def told(run: Trajectory) -> str:
    return f"{run.facts['id']}-{run.facts['lib']}-{run.facts['cls']}-{run.facts['tag']}"


def failures(runs: list[Trajectory]) -> list[str]:
    found = ((run, *difference(run)) for run in runs)
    return [f"{told(run)}: {error:.2g}, {bad} decisions" for run, error, bad in found if bad or error > tolerance(run.facts)]


@pytest.mark.parametrize("package", ["cg", "cg_eff", "cm"])
def test_i2_to_i12_i19_i20_the_fixture_s_trajectories_of_a_package_are_repeated(package: str) -> None:
    runs = [run for run in FIXTURE if run.facts["lib"] == package]
    assert len(runs) >= 40 and failures(runs) == []


def test_the_fixture_covers_every_class_option_and_dtype() -> None:
    facts = [run.facts for run in FIXTURE]
    assert {f["cls"].removesuffix("_eff") for f in facts} == {"SGD_C", "RMSprop_C", "Adam_C", "AdamW_C", "Adam_CM"}
    assert len({(f["lib"], f["cls"]) for f in facts}) == 12
    options = [f["resolved"] | f["kwargs"] for f in facts]
    assert {o.get("aggr") for o in options} == {"sum", "mid", "mean", None}
    assert {o["topC"] for o in options} == {1, 2, 5, 10, 20} and {0, 0.7, 0.9, 0.99, 1} <= {o["decay"] for o in options}
    assert {o.get("critical_test", 0) for o in options} == {0, 0.5, 1} and {o["synced"] for o in options} == {True, False}
    assert {(f["dtype"], o.get("buffer_dtype")) for f, o in zip(facts, options, strict=True)} == {
        ("float64", None), ("float32", None), ("float32", "bfloat16")}  # fmt: skip
    for name in ("amsgrad", "centered", "momentum", "dampening", "weight_decay"):
        assert any(o.get(name) for o in options)


@pytest.mark.parametrize("package", ["cg", "cg_eff", "cm"])
def test_i8_to_i10_all_712_trajectories_of_the_packages_are_repeated(package: str) -> None:
    source = folder()
    if source is None:
        pytest.skip("needs the whole reference: set MANGO_REFERENCE to the folder of cg_cm_reference.npz")
    runs = [run for run in everything(source) if run.facts["lib"] == package]
    assert len(runs) == {"cg": 310, "cg_eff": 198, "cm": 204}[package]
    assert failures(runs) == []
