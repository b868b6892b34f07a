"""The door to the studies: `python main.py --mode comparative --epochs 100 --batch-size 128` is `mango run comparative ...`.

Beside the methods of `mango run`, `--mode single --optimizer NAME` knows the baselines of experiments/baseline_optimizers.py.
"""

import argparse
import sys

from train_policy.cli import main as mango


def main() -> None:
    """Take `--mode` off the line and hand the rest to `mango run`."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="All other options: mango run --help", allow_abbrev=False)
    parser.add_argument("--mode", required=True, choices=("single", "comparative", "ablation"))
    mode, rest = parser.parse_known_args()
    if mode.mode == "single":
        import experiments.study_baselines  # noqa: F401 - makes the baselines known

    sys.argv = [sys.argv[0], "run", mode.mode, *rest]
    mango()


if __name__ == "__main__":
    main()
