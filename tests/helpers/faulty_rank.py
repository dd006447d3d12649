"""`higgstune ...` without plan and proof, of which a process may go wrong from its third step on.

faulty_rank.py FAULT RANK train ...     FAULT is `fail`, `dawdle` or `none`
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from training_world import Unplanned, proven
from with_parent import end_with_parent

from higgstune.cli.main import main as cli
from higgstune.errors import WorkError
from higgstune.training import run, stage
from higgstune.training.trainer import HiggsAudioTrainer


def fail() -> None:
    raise WorkError("this process has had enough")


def dawdle() -> None:
    time.sleep(0.3)


FAULTS: dict[str, Callable[[], None]] = {"fail": fail, "dawdle": dawdle}


def from_third_step(fault: Callable[[], None]) -> None:
    step, taken = HiggsAudioTrainer.training_step, 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken >= 3:
            fault()
        return step(*arguments, **options)

    HiggsAudioTrainer.training_step = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    end_with_parent()  # a launcher that is killed stops none of its processes
    name, rank = sys.argv[1:3]
    del sys.argv[1:3]
    run.RunMemory = Unplanned  # type: ignore[misc, assignment]
    stage.verify_in_fresh_process = proven
    if name != "none" and os.environ["RANK"] == rank:
        from_third_step(FAULTS[name])
    cli()
