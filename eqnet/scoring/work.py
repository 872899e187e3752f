"""Work that several processes share: whichever is free takes the next unit, so a slow process delays nothing but its own unit.

The counter lies in the store that the processes of a launch met in (`MASTER_ADDR`, `MASTER_PORT`), whose additions are atomic.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from itertools import count as numbers

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore

Advance = Callable[[], None]


def shared(count: int, accelerator: Accelerator, advance: Advance | None = None) -> Iterator[int]:
    """Numbers from 0 to `count - 1`, each on exactly one process, in rising order; called by all processes.

    Which process gets a number depends on their speed, so results must not: return them with their number.

    Args:
        count: units of work, the same on all processes.
        accelerator: of this process.
        advance: called once per unit of any process, as far as this one has noticed.
    """
    take, seen = _counter(accelerator), 0
    while True:
        unit = take()
        if advance is not None:
            for _ in range(min(unit, count) - seen):
                advance()
        seen = min(unit, count)
        if unit >= count:
            return
        yield unit


def _counter(accelerator: Accelerator) -> Callable[[], int]:
    """A function that returns 0, 1, 2, ..., each number on one process."""
    if accelerator.num_processes == 1:
        return numbers().__next__
    # a name of its own: the store outlives a restart of the processes by torchrun
    name = [f"eqnet-units-{uuid.uuid4()}"]
    broadcast_object_list(name)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False)
    return lambda: int(store.add(name[0], 1)) - 1
