"""From recorded training runs to a frozen policy: cloning, offline RL, PPO, gate, evaluation, the `mango` command.

The modules import d3rlpy, Stable-Baselines3 and YAML only where a function needs them.
"""
