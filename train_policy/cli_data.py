"""`mango data`: look at trajectory stores, check them, put them together, take them apart, and make them fit for training."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from train_policy.cli_support import JsonOption, SeedOption, console, emit, guarded, number, print_table

data_app = typer.Typer(no_args_is_help=True, help="Trajectory stores: look, check, merge, split, pack, salvage.")

Store = Annotated[Path, typer.Argument(help="a trajectory store: its folder, or one file made by compact")]


@data_app.command()
@guarded
def info(store: Store, json: JsonOption = None) -> None:
    """What is in a store: runs, workloads, behaviours, returns, rungs, identity."""
    from mango_env.dataset import info as look

    found = look(store)
    emit(json, found, lambda: print_table(str(store), ("", ""), [(key, counts(value)) for key, value in found.items()]))


def counts(value: Any) -> Any:
    """A dict of counts on one line."""
    return ", ".join(f"{key} {number(count)}" for key, count in value.items()) if isinstance(value, dict) else value


@data_app.command()
@guarded
def card(
    store: Store,
    out: Annotated[Path | None, typer.Option(help="a Markdown file; default: stdout")] = None,
    json: JsonOption = None,
) -> None:
    """The dataset card, Markdown: what a store covers, returns by behaviour, and what a reader must know."""
    from mango_env.card import card_of, write_card

    made = card_of(store) if out is None else write_card(store, out)
    emit(json, made.to_dict(), lambda: print(made) if out is None else console.print(f"wrote {out}", highlight=False))


@data_app.command()
@guarded
def validate(store: Store, json: JsonOption = None) -> None:
    """Compare every episode with the standard, its hash and its own terms. Exit code 1 where something is wrong."""
    from mango_env.validate import validate as check

    report = check(store)
    emit(json, report.to_dict(), lambda: console.print(str(report), highlight=False, markup=False))
    if not report.ok:
        raise typer.Exit(1)


@data_app.command()
@guarded
def merge(
    stores: Annotated[list[Path], typer.Argument(help="the stores to put together")],
    out: Annotated[Path, typer.Option(help="the new store")],
    reward: Annotated[str | None, typer.Option(help="weights alpha,beta,gamma: recompute all rewards with them")] = None,
    json: JsonOption = None,
) -> None:
    """One store with the episodes of several; the same episode twice counts once."""
    from mango_env.curate import merge as put_together

    weights = None if reward is None else reward_of(reward)
    root = put_together(stores, out, reward=weights)
    emit(json, {"path": str(root)}, lambda: console.print(f"wrote {root}"))


def reward_of(text: str) -> Any:
    """A reward from "alpha,beta,gamma", against the uncompressed twin."""
    from mango_env.reward import Reward
    from train_policy.cli_support import parse_list

    weights = parse_list(text, float, "--reward")
    if len(weights) != 3:
        raise ValueError(f"--reward {text!r} has {len(weights)} weights; give alpha,beta,gamma")
    alpha, beta, gamma = weights
    return Reward(alpha=alpha, beta=beta, gamma=gamma)


@data_app.command()
@guarded
def split(
    store: Store,
    out: Annotated[Path, typer.Option(help="folder of the parts, one store each")],
    by: Annotated[str, typer.Option(help="run or workload; never by step, which would leak")] = "run",
    parts: Annotated[str, typer.Option(help="name=fraction,..., summing to 1")] = "train=0.8,test=0.2",
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Part a store by whole runs or whole workloads."""
    from mango_env.curate import split as part

    fractions = {}
    for item in parts.split(","):
        name, equals, fraction = item.partition("=")
        try:
            fractions[name.strip()] = float(fraction)
        except ValueError:
            raise ValueError(f"--parts: {item!r} is not name=fraction") from None
        if not equals or not name.strip():
            raise ValueError(f"--parts: {item!r} is not name=fraction")
    roots = part(store, out, by=by, fractions=fractions, seed=seed)
    paths = {name: str(root) for name, root in roots.items()}
    emit(json, paths, lambda: console.print("\n".join(f"wrote {path}" for path in paths.values()), highlight=False))


@data_app.command()
@guarded
def compact(
    store: Store,
    out: Annotated[Path, typer.Option(help="the file, ending in .h5 or .hdf5")],
    compression: Annotated[str, typer.Option(help="gzip, lzf or none")] = "gzip",
    json: JsonOption = None,
) -> None:
    """A whole store as one HDF5 file to share."""
    from mango_env.curate import compact as pack

    if compression not in ("gzip", "lzf", "none"):
        raise ValueError(f"--compression {compression!r} is not gzip, lzf or none")
    path = pack(store, out, compression=None if compression == "none" else compression)
    emit(json, {"path": str(path), "bytes": path.stat().st_size}, lambda: console.print(f"wrote {path}"))


@data_app.command()
@guarded
def flatten(
    store: Store,
    out: Annotated[Path, typer.Option(help="the file, ending in .h5 or .hdf5")],
    bits: Annotated[int, typer.Option(help="what floats keep of the 23 bits of their mantissas")] = 10,
    json: JsonOption = None,
) -> None:
    """What training reads as one small file: `--data` takes it in the place of a store. Episodes cannot be had back."""
    from mango_env.cache import build_cache
    from mango_env.cache import flatten as pack

    path = pack(build_cache(store), out, bits)
    told = f"wrote {path}, {path.stat().st_size:,} bytes"
    emit(json, {"path": str(path), "bytes": path.stat().st_size, "bits": bits}, lambda: console.print(told, highlight=False))


@data_app.command()
@guarded
def cache(store: Store, json: JsonOption = None) -> None:
    """Build the flat arrays that training reads, unless they are there already."""
    from mango_env.cache import build_cache

    built = build_cache(store)
    content = {"path": str(built.path), "transitions": len(built), "episodes": len(built.lengths), "digest": built.digest}
    emit(json, content, lambda: console.print(f"{built.path}: {len(built):,} transitions of {len(built.lengths):,} episodes"))


@data_app.command()
@guarded
def salvage(
    store: Annotated[Path, typer.Argument(help="folder of a store whose writer was killed")],
    elsewhere: Annotated[bool, typer.Option(help="no other machine is recording: take its unfinished shards too")] = False,
    json: JsonOption = None,
) -> None:
    """Bring the complete episodes of killed writers back into the store and rebuild its index."""
    from mango_env.salvage import salvage as recover

    found = recover(store, elsewhere=elsewhere)

    def tell() -> None:
        console.print(f"recovered {found.episodes} episodes from {len(found.recovered)} shards")
        for what in ("quarantined", "alive"):
            if getattr(found, what):
                console.print(f"{what}: {', '.join(getattr(found, what))}", highlight=False)

    emit(json, asdict(found), tell)
