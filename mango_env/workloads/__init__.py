"""Training runs to compress: the table `WORKLOADS`, one file per family, and `make_workload` for a name or a user's own.

Importing this package loads no data set and no library but torch and numpy; a workload loads what it needs when it is made.
"""

from mango_env.workloads import (  # each puts its workloads into the table
    bert,
    cifar10,
    digits,
    fashion,
    gpt2,
    imagenet,
    llama,
    mnist,
    multi30k,
    novels,
    recurrent,
    resnet,
    sst2,
    text,
    vit,
)
from mango_env.workloads.base import (
    HELD_OUT,
    WORKLOADS,
    ResumableWorkload,
    Workload,
    WorkloadBuilder,
    check_workload,
    make_workload,
    register_workload,
    split_options,
    workload_name,
)
from mango_env.workloads.initialise import initialise

__all__ = [
    "HELD_OUT",
    "WORKLOADS",
    "ResumableWorkload",
    "Workload",
    "WorkloadBuilder",
    "bert",
    "check_workload",
    "cifar10",
    "digits",
    "fashion",
    "gpt2",
    "imagenet",
    "initialise",
    "llama",
    "make_workload",
    "mnist",
    "multi30k",
    "novels",
    "recurrent",
    "register_workload",
    "resnet",
    "split_options",
    "sst2",
    "text",
    "vit",
    "workload_name",
]
