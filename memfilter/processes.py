"""The processes that a launcher has started, for work that needs no gradients; training has `memfilter.train.engine`."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # for processes that have less to do


def processes() -> PartialState:
    """The processes that the launcher has started.

    Raises:
        ValueError: they are not connected.
    """
    patience = {"timeout": PATIENCE} if "LOCAL_RANK" in os.environ else {}
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **patience)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    found = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not launched == found == state.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes and accelerate connected {state.num_processes} of them; on "
            f"CPUs use ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} -m memfilter.cli evaluate ..."
        )
    return state


def from_main(state: PartialState, make: Callable[[], T]) -> T:
    """What ``make`` gives in the main process, in all of them; every one calls. For what decides which way they all go: each
    may see copies of files of its own, with dates of their own, and where they part one waits for another for ever.

    Raises:
        Exception: what ``make`` raises in the main process; a ValueError with its message in the others.
    """
    made, error = None, None
    if state.is_main_process:
        try:
            made = make()
        except Exception as found:  # the others must not wait for it
            error = found
    made, told = broadcast_object_list([made, error and (str(error) or repr(error))])
    if error is not None:
        raise error
    if told is not None:
        raise ValueError(told)
    return made


def end_processes() -> None:
    """Parts from the other processes, if there are any; call this last."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # torchrun ends the others as soon as one is gone, and the first still has files to close
        dist.destroy_process_group()
