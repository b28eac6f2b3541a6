"""Makes a hybrid, is killed before a step of the optimizer, goes on: run by test_hybridize.py as a process of its own.

    killed_hybrid.py MODEL DATA OUT STEPS…      one child for each number of steps that it may take
Prints the children's exit codes as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_hybridize as settings

from tiercel.train.hybridize import hybridize
from tiercel.train.loop import Trainer


def life(model: str, data: str, out: str, steps: int) -> None:
    plain, taken = Trainer.train_step, [0]

    def step(trainer: Trainer, number: int):
        if taken[0] == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        taken[0] += 1
        return plain(trainer, number)

    Trainer.train_step = step
    changed = settings.settings(Path(out), resume=True)
    hybridize(model, [Path(data)], changed, settings.conversion(), checks=settings.CHECKS)


def forked(steps: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            life(*sys.argv[1:4], steps)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


print(json.dumps([forked(int(steps)) for steps in sys.argv[4:]]))
