"""Starts the processes of a run on CPU: `python -m eqnet.launch --nproc_per_node=2 -- train.py ...`, as torchrun does.

If one of them dies, the others are stopped and the launch ends with one sentence instead of torchrun's traceback.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from eqnet.command import INTERRUPTED, MISTAKE


def main() -> None:
    """Runs torchrun; exits as the first process that failed."""
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException:
        sys.exit(INTERRUPTED)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (MISTAKE, INTERRUPTED):  # these have said why
            how = f"exit code {failure.exitcode}"
            if failure.exitcode < 0:
                how = f"signal {signal.Signals(-failure.exitcode).name}"
            print(
                f"error: process {rank} ended by {how}; the others were stopped and what was finished is kept: continue with "
                "--resume.",
                file=sys.stderr,
            )
        sys.exit(max(failure.exitcode, 1))


if __name__ == "__main__":
    main()
