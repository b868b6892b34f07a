"""Training runs to compress: the table `WORKLOADS`, one file per family, and `make_workload` for a name or a user's own.

Importing this package loads no data set and no library but torch and numpy; a workload loads what it needs when it is made.
"""

from mango_env.workloads import cifar10, digits, mnist, text  # each puts its workloads into the table
from mango_env.workloads.base import (
    WORKLOADS,
    ResumableWorkload,
    Workload,
    WorkloadBuilder,
    check_workload,
    make_workload,
    register_workload,
    workload_name,
)
from mango_env.workloads.initialise import initialise

__all__ = [
    "WORKLOADS",
    "ResumableWorkload",
    "Workload",
    "WorkloadBuilder",
    "check_workload",
    "cifar10",
    "digits",
    "initialise",
    "make_workload",
    "mnist",
    "register_workload",
    "text",
    "workload_name",
]
