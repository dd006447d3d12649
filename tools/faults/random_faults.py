"""Faults at random moments: kills, signals, full disks and damaged checkpoints, until so many have hit.

    python tools/faults/random_faults.py --faults 50 --seed 0

A run of the tests' tiny model, both stages without their verification, is hit and resumed until it has finished; then
its adapters must be those of an uninterrupted run, bit by bit. Prints a line for each fault.
"""

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

import psutil
from processes import Together
from training_world import assert_identical, faulty_recipe, make_world, train_unproven

from higgstune.config.recipe import Recipe

FAULTS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "full disk", "damaged checkpoint")
CODES = {"SIGKILL": {-9}, "SIGTERM": {143}, "SIGINT": {130}, "full disk": {0, 1}}
IN_TIME = 30.0  # seconds after a signal


def start(made: Recipe, out: Path, resume: bool) -> None:
    """What a process of the run does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk is an error, not a signal
    train_unproven(made, out, resume)


def hit(run: Together, fault: str, moment: float) -> tuple[int | None, float]:
    """Let a run work for so many seconds, hit it, and wait -> (exit code, seconds until it had ended)."""
    (process,) = run.all
    process.join(moment)
    began = time.monotonic()
    if process.exitcode is None and process.pid is not None:
        if fault == "full disk":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (10_000, hard))
        else:
            process_signal = signal.SIGKILL if fault == "damaged checkpoint" else signal.Signals[fault]
            psutil.Process(process.pid).send_signal(process_signal)
    (code,) = run.exit_codes(180)
    return code, time.monotonic() - began


def damage(run: Path, chance: random.Random) -> None:
    """Cut off a file of a run's newest checkpoint, where there is one beside it to go back to."""
    for folder in run.glob("*/checkpoints"):
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        if len(found) > 1:
            file = chance.choice(sorted(found[-1].iterdir()))
            with open(file, "r+b") as opened:
                opened.truncate(file.stat().st_size // 2)


def main() -> None:
    """Hit runs until enough faults have hit; exits with 1 at the first thing that was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    world = make_world(Path(tempfile.mkdtemp()))
    made = faulty_recipe(world)
    began = time.monotonic()
    Together(world / "logs", 1, start, made, world / "whole", False).succeeded()
    usual = time.monotonic() - began
    count, runs, hits = 0, 0, Counter[str]()
    while count < given.faults:
        run, attempt, code = world / f"run{runs}", 0, None
        while code != 0:
            fault = chance.choice(FAULTS) if count < given.faults else "none"
            moment = chance.uniform(0.0, usual) if fault != "none" else 600.0
            resume = (run / "run.json").exists()
            going = Together(world / f"logs{runs}-{attempt}", 1, start, made, run, resume)
            code, seconds = hit(going, fault, moment)
            if code != 0 and fault != "none":
                count += 1
                hits[fault] += 1
                print(f"{count} run {runs}: {fault} after {moment:.1f} s, exit code {code} in {seconds:.1f} s")
            expected = CODES.get(fault, {-9}) | {0}
            if code not in expected or (fault in ("SIGTERM", "SIGINT") and seconds > IN_TIME and code != 0):
                sys.exit(f"{fault}: exit code {code} in {seconds:.1f} s\n{going.log()}")
            if fault == "damaged checkpoint" and code != 0:
                damage(run, chance)
            attempt += 1
        assert_identical(run, world / "whole")
        runs += 1
    print(f"{count} faults in {runs} runs, nothing lost: {dict(hits)}")


if __name__ == "__main__":
    main()
