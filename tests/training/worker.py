"""What the tests of training run in processes of their own: ``python -m tests.training.worker COMMAND FOLDER ...``."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastgen import registry
from fastgen.training import RunDir, checkpoint, fit, load
from tests.training.tiny_models import ENTRIES, labelled_data, make_duel, make_tiny

OPTIONS = {"batch_size": 8, "ema": 0.9, "checkpoint_every": 1, "log_every": 2, "sample_every": 0, "device": "cpu"}


def say(*words) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def train(folder: str, steps: str, pause: str = "0") -> None:
    """Train; ``pause`` seconds after each step. Prints each step and whether the run was interrupted."""

    def report(state) -> None:
        say(state.step)
        time.sleep(float(pause))

    result = fit(make_tiny(), labelled_data(), steps=int(steps), out=folder, hooks=[report], **OPTIONS)
    say("interrupted" if result.interrupted else "done", result.steps)


def kill(folder: str, kills: str) -> None:
    """Train in child processes that are killed at random instants; after each, the run must load and not go back.

    The instants follow the machine: later where a child came to no checkpoint, sooner where it did, so that on a busy one too
    most are killed while they train and some while they start.
    """
    fit(make_tiny(), labelled_data(), steps=1, **OPTIONS)  # what torch imports late is there when the children start
    run, dice, last, window = RunDir(Path(folder)), random.Random(0), -1, 0.25
    for _ in range(int(kills)):
        child = os.fork()
        if child == 0:
            fit(make_tiny(), labelled_data(), steps=1_000_000, out=folder, resume=True, **OPTIONS)
            os._exit(1)
        time.sleep(dice.uniform(0.0, window))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        if not run.state.exists():
            window = min(1.5 * window, 3.0)
            continue  # killed before the first checkpoint
        step = checkpoint.read(run.state)[1]["step"]
        assert step >= last, f"went back from step {last} to {step}"
        assert checkpoint.read_meta(run.model)["step"] in (step, step + 1)
        load(folder, device="cpu")
        window = 0.9 * window if step > last else min(1.5 * window, 3.0)
        last = step
        litter = list(run.path.glob(".*"))
        assert len(litter) <= 1, litter
    say(last)


def finish(folder: str, steps: str) -> None:
    """Train to ``steps``, from where the run stands or from the beginning."""
    fit(make_tiny(), labelled_data(), steps=int(steps), out=folder, resume=True, **{**OPTIONS, "checkpoint_every": 50})


def distributed(folder: str, steps: str) -> None:
    """Train two models as one of several processes, if the environment says so."""
    model = make_tiny(dropout=0.0)
    model.encoder[1] = torch.nn.Identity()  # batch statistics are each process's own
    for name, part in (("tiny", model), ("duel", make_duel())):
        out = Path(folder) / name
        fit(part, labelled_data(), steps=int(steps), out=out, batch_size=8, device="cpu", sample_every=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    registry.names()
    registry._entries.update(ENTRIES)
    {"train": train, "kill": kill, "finish": finish, "distributed": distributed}[sys.argv[1]](*sys.argv[2:])
