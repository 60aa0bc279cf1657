"""The trainer: one loop that trains every model, phase by phase.

Nothing that decides the weights lives outside the run's state: the data order is a function of seed and epoch, noise
is a function of seed and batch number, and torch's own generators are seeded at the start and kept with the weights. So
a run that was cut off and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fastgen
from fastgen import random
from fastgen._arguments import check_device, check_whole
from fastgen.data import Source
from fastgen.nn.model import Batch, Model, Phase
from fastgen.training import checkpoint, log
from fastgen.training.batches import Batches, open_source
from fastgen.training.distributed import World, world
from fastgen.training.run import RunDir, describe_model

__all__ = ["FitResult", "Hook", "NonFiniteLoss", "State", "fit", "resume"]


class NonFiniteLoss(RuntimeError):  # noqa: N818 - the name says what happened
    """A loss, or a weight after an update, is NaN or infinite; the message names step, phase and part."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What :func:`fit` did.

    Attributes:
        steps: steps done in all, those of earlier runs included.
        seconds: time spent on them, likewise.
        metrics: the last means of all loss parts, as ``phase/part``, with ``seconds`` and ``samples_per_second``.
        out: the run directory, or None.
        interrupted: whether SIGINT or SIGTERM ended the run early.
        notes: things worth saying, such as a picture that could not be drawn.
    """

    steps: int
    seconds: float
    metrics: dict[str, float]
    out: Path | None
    interrupted: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class State:
    """What a hook sees after a step: its number (from 1), the model, and the step's losses."""

    step: int
    model: Model
    parts: Mapping[str, Tensor]

    @property
    def metrics(self) -> dict[str, float]:
        """The step's losses as ``phase/part``; waits for the device."""
        return {name: value.item() for name, value in self.parts.items()}


Hook = Callable[[State], object]


class _PhaseLoss(nn.Module):
    """A phase's loss as a module's forward: what DistributedDataParallel can wrap."""

    def __init__(self, model: Model, loss: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch, key: Tensor) -> tuple[Tensor, ...]:
        return self._loss(batch, key=key)


class _PhaseRun:
    """A phase with its optimiser: one call, one update."""

    def __init__(self, model: Model, phase: Phase, where: World, precision: str, compile: bool) -> None:
        self.phase = phase
        self.parameters = list(phase.parameters)
        self.optimizer = phase.optimizer(self.parameters)
        own = set(self.parameters)
        if not own <= set(model.parameters()):
            raise ValueError(f"phase {phase.name!r} trains a tensor that is not among the model's parameters")
        self._others = [p for p in model.parameters() if p.requires_grad and p not in own]
        self._autocast = torch.autocast(where.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        loss = torch.compile(phase.loss) if compile else phase.loss
        self._loss: nn.Module = _PhaseLoss(model, loss)
        if where.size > 1:
            with self._others_frozen():
                self._loss = DistributedDataParallel(self._loss, find_unused_parameters=True)

    @contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Keep gradients from the parameters of other phases."""
        for p in self._others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in self._others:
                p.requires_grad_(True)

    def update(self, batch: Batch, key: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser; the losses by name."""
        with self._others_frozen():
            with self._autocast:
                losses = self._loss(batch, key)
            parts = self._named(losses)
            self.optimizer.zero_grad(set_to_none=True)
            losses[0].backward()
            self.optimizer.step()
        if self.phase.after is not None:
            self.phase.after()
        return parts

    def _named(self, losses: Any) -> dict[str, Tensor]:
        fields = getattr(losses, "_fields", None)
        if fields is None:
            raise TypeError(
                f"the loss of phase {self.phase.name!r} must be a named tuple of scalars, got {type(losses).__name__}"
            )
        for field, value in zip(fields, losses, strict=True):
            if not isinstance(value, Tensor) or value.dim() != 0:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"loss part {field!r} of phase {self.phase.name!r} must be a scalar tensor, got {shape}")
        return {f"{self.phase.name}/{f}": v.detach() for f, v in zip(fields, losses, strict=True)}


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag; the second of them acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python gives signals to the main thread alone
        return

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class _Trainer:
    """The state of a run, and the loop over it."""

    def __init__(self, model: Model, source: Source, where: World, options: dict[str, Any]) -> None:
        self.model = model
        self.where = where
        self.seed: int = options["seed"]
        self.log_every: int = options["log_every"]
        self.names = {p: name for name, p in model.named_parameters()}
        self.ema: AveragedModel | None = None
        if options["ema"] is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options["ema"]))
        self.source = source
        self.batches = Batches(source, options["batch_size"], self.seed, where)
        self.local_batch: int = options["batch_size"] // where.size
        self.precision: str = options["precision"]
        self.compile: bool = options["compile"]
        self.phases: list[_PhaseRun] = []
        self.step = 0
        self.seconds = 0.0
        self.logged = 0  # step of the last regular line in metrics.jsonl
        self.window: dict[str, list[float]] = {}  # losses since then
        self.last_line: dict[str, Any] = {}
        self.recent: list[tuple[int, list[str], Tensor]] = []  # losses still on the device: step, names, values
        self.line_time = time.perf_counter()
        self.line_samples = 0
        self._one_update = torch.tensor([0, 0, 1, 0], device=where.device)

    def start(self, phases: Sequence[Phase], stored: tuple[dict[str, Tensor], dict[str, Any]] | None, path: Path) -> None:
        """Make the optimisers, and take up the state of a checkpoint if there is one."""
        self.weights().train()
        self.model.train()
        torch.manual_seed(self.seed + self.where.rank)
        if stored is not None:
            tensors, meta = stored
            checkpoint.load_weights(self.model, _below("model/", tensors), path)
            if self.ema is not None:
                checkpoint.load_weights(self.ema, _below("ema/", tensors), path)
            self.step, self.seconds, self.logged = meta["step"], meta["seconds"], meta["logged"]
            self.window = meta["window"]
        self.phases = [_PhaseRun(self.model, p, self.where, self.precision, self.compile) for p in phases]
        self.batches.skip(self.updates(self.step))
        if stored is not None:
            for run in self.phases:
                name = run.phase.name
                meta_of_phase = meta["optimizers"].get(name)
                if meta_of_phase is None:
                    raise ValueError(f"{path} does not fit the model: it has no optimiser of phase {name!r}")
                checkpoint.restore_optimizer(run.optimizer, self.names, f"optimizer/{name}", tensors, meta_of_phase)
            self._restore_generators(tensors)

    def weights(self) -> Model:
        """The model with the weights to use."""
        return self.model if self.ema is None else cast(Model, self.ema.module)

    def updates(self, step: int) -> int:
        """Updates, and so batches, in the first ``step`` steps."""
        return sum(run.phase.repeat * (step // run.phase.every) for run in self.phases)

    def one_step(self, key: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One step through the phases; the last losses of each by name, and the key of the next step."""
        number = self.updates(self.step)
        self.step += 1
        parts: dict[str, Tensor] = {}
        for run in self.phases:
            if self.step % run.phase.every:
                continue
            for _ in range(run.phase.repeat):
                batch = self.batches.batch(number)
                losses = run.update(batch, key)
                self.recent.append((self.step, list(losses), torch.stack([v.float() for v in losses.values()])))
                parts |= losses
                number += 1
                key = key + self._one_update
                self.line_samples += len(batch if isinstance(batch, Tensor) else batch[0]) * self.where.size
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return parts, key

    def first_key(self) -> Tensor:
        """The key of the next update: its step word counts updates, and each process starts at its own sample."""
        return random.key(
            self.seed,
            stream=random.Stream.TRAIN,
            step=self.updates(self.step),
            sample=self.where.rank * self.local_batch,
            device=self.where.device,
        )

    def collect(self) -> None:
        """Fetch the losses from the device into the window; ``NonFiniteLoss`` if one of them is not finite."""
        if not self.recent:
            return
        values = iter(self.where.mean(torch.cat([v for _, _, v in self.recent])).tolist())
        for step, names, _ in self.recent:
            for name in names:
                value = next(values)
                if not math.isfinite(value):
                    phase, _, part = name.rpartition("/")
                    raise NonFiniteLoss(f"step {step}, phase {phase!r}: the loss part {part!r} is {value}")
                self.window.setdefault(name, []).append(value)
        self.recent.clear()

    def line(self, elapsed: float) -> dict[str, Any]:
        """A line of ``metrics.jsonl``: means over the window."""
        now = time.perf_counter()
        rate = self.line_samples / max(now - self.line_time, 1e-9)
        means = {name: math.fsum(values) / len(values) for name, values in self.window.items()}
        self.last_line = {
            "step": self.step,
            **means,
            "seconds": round(elapsed, 3),
            "samples_per_second": round(rate, 1),
        }
        if self.step % self.log_every == 0:
            self.logged, self.window, self.line_time, self.line_samples = self.step, {}, now, 0
        return self.last_line

    def check_weights(self) -> None:
        """``NonFiniteLoss`` if a trained weight is not finite: such a state is never saved."""
        for run in self.phases:
            finite = torch.stack([p.detach().isfinite().all() for p in run.parameters])
            if not bool(finite.all()):
                name = self.names[run.parameters[int(finite.int().argmin())]]
                raise NonFiniteLoss(f"step {self.step}, phase {run.phase.name!r}: the weights {name!r} are not finite")

    def save(self, run_dir: RunDir | None, elapsed: float) -> None:
        """Write a checkpoint; all processes must call this."""
        self.check_weights()
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": t for name, t in self.ema.state_dict().items()}
        tensors |= self._generators()
        if run_dir is None or not self.where.main:
            return
        optimizers = {}
        for run in self.phases:
            name = run.phase.name
            more, optimizers[name] = checkpoint.store_optimizer(run.optimizer, self.names, f"optimizer/{name}")
            tensors |= more
        meta = {
            "step": self.step,
            "seconds": elapsed,
            "logged": self.logged,
            "window": self.window,
            "optimizers": optimizers,
            "version": fastgen.__version__,
        }
        # The weights first: a kill between the two leaves them ahead of the state, and a resume writes them again.
        checkpoint.write(run_dir.model, self.weights().state_dict(), {"step": self.step})
        checkpoint.write(run_dir.state, tensors, meta)

    def _generators(self) -> dict[str, Tensor]:
        """The states of torch's default generators, of every process."""
        states = {"cpu": torch.get_rng_state()}
        if self.where.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.where.device)
        return {
            f"generator/{kind}/{rank}": found
            for kind, state in states.items()
            for rank, found in enumerate(self.where.gather(state))
        }

    def _restore_generators(self, tensors: Mapping[str, Tensor]) -> None:
        rank = self.where.rank
        if (state := tensors.get(f"generator/cpu/{rank}")) is not None:
            torch.set_rng_state(state)
        if self.where.device.type == "cuda" and (state := tensors.get(f"generator/cuda/{rank}")) is not None:
            torch.cuda.set_rng_state(state, self.where.device)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
        check_whole(name, options[name], 1)
    check_whole("seed", options["seed"])
    if options["sample_every"] is not None:
        check_whole("sample_every", options["sample_every"], 0)
    if options["ema"] is not None and not 0 <= options["ema"] < 1:
        raise ValueError(f"ema must be in [0, 1), got {options['ema']}")
    if options["precision"] not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {options['precision']!r}")


def _check_same_run(run_dir: RunDir, new: Mapping[str, Any]) -> None:
    """``ValueError`` naming the first thing in which a resumed run would differ from the one on disk."""
    old = run_dir.read_config()
    keys = ("batch_size", "seed", "ema", "precision")
    kind = "class" if new["model"] is None else "model"
    pairs = [(f"the {kind}", old[kind], new[kind])]
    pairs += [(f"model option {k}", old["config"].get(k), v) for k, v in new["config"].items()]
    pairs += [(k, old["fit"].get(k), new["fit"][k]) for k in keys]
    pairs += [("the data's fingerprint", old["data"]["fingerprint"], new["data"]["fingerprint"])]
    for what, was, now in pairs:
        if was != now:
            raise ValueError(f"cannot resume {run_dir.path}: {what} was {was!r}, now it is {now!r}")


def _read_state(run_dir: RunDir | None, resume: bool, config: Mapping[str, Any]) -> Any:
    """The checkpoint to go on from, or None to begin; leaves no rest of a killed run."""
    if run_dir is None:
        return None
    if run_dir.path.exists() and not run_dir.path.is_dir():
        raise ValueError(f"out must be a folder, {run_dir.path} is a file")
    if not run_dir.state.is_file():
        return None
    if not resume:
        step = checkpoint.read_meta(run_dir.state)["step"]
        raise ValueError(
            f"{run_dir.path} holds a run at step {step}: resume it (resume=True, fastgen train --resume {run_dir.path}), "
            "or choose another folder"
        )
    _check_same_run(run_dir, config)
    return checkpoint.read(run_dir.state)


def fit(
    model: Model,
    data: Any,
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    sample_every: int | None = None,
    ema: float | None = None,
    precision: str = "float32",
    device: torch.device | str | None = None,
    compile: bool = False,
    resume: bool = False,
    progress: bool | None = None,
    tensorboard: bool = False,
    hooks: Iterable[Hook] = (),
) -> FitResult:
    """Train a model, in place.

    Afterwards the model is in evaluation mode and holds the weights to use: the moving average's if ``ema`` is given.
    SIGINT and SIGTERM end the run after the current step, with a checkpoint; a second one acts at once. Under
    ``torchrun`` every process takes its slice of each batch and the first one writes; gradients are averaged.

    Args:
        model: any :class:`fastgen.nn.Model`. Its weights are where training starts: call ``torch.manual_seed`` before
            making it if they are to be the same each time.
        data: the name of a data set, a path, or anything that :func:`fastgen.data.as_source` takes.
        steps: when to stop, counted from the very first step. Phases run on the steps that their ``every`` divides.
        batch_size: samples per update over all processes; a stream's own batches have the size they have.
        seed: decides the data order, all noise, and torch's generators within the run (the caller's are left alone).
        out: run directory for checkpoints, metrics and pictures (see :mod:`fastgen.training.run`); None writes nothing.
        checkpoint_every: steps between checkpoints; there is one at the start and one at the end, too.
        log_every: steps between lines of ``metrics.jsonl``, each with the mean of every loss part since the last.
        sample_every: steps between pictures of samples; None for ``checkpoint_every``, 0 for none.
        ema: decay of a moving average of the weights, in [0, 1); None keeps none.
        precision: "float32", or "bfloat16": the losses run under ``torch.autocast``.
        device: None for CUDA where there is one, else the CPU.
        compile: run the losses under ``torch.compile``.
        resume: go on from the checkpoint in ``out``, bit for bit as if nothing had happened; where there is none yet,
            begin. Model, data, batch size, seed, ema and precision must be those of the run.
        progress: whether to show a bar on stderr; None shows it on a terminal.
        tensorboard: write the metrics for TensorBoard too, to ``out/tensorboard``.
        hooks: called with a :class:`State` after each step, before anything is saved.

    Returns:
        see :class:`FitResult`.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite; the last checkpoint stays as it was. On an accelerator this is
            looked at when metrics are logged or a checkpoint is due, so that no step waits for the device.
        ValueError: an argument that cannot be used, data of the wrong shape, or a resume of another run.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be a fastgen.nn.Model, such as fastgen.create(...) makes, got {type(model).__name__}")
    check_device(device)
    hooks = list(hooks) if isinstance(hooks, Iterable) else [hooks]
    for hook in hooks:
        if not callable(hook):
            raise TypeError(f"hooks must be functions that are called with a State, got {hook!r}")
    settings: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "sample_every": sample_every,
        "ema": ema,
        "precision": precision,
        "compile": compile,
        "tensorboard": tensorboard,
    }
    _check_options(settings)
    if out is None and (resume or tensorboard):
        raise ValueError(f"{'resume' if resume else 'tensorboard'}=True needs out, the run directory")
    run_dir = None if out is None else RunDir(Path(out))
    source = open_source(data, model.event_shape)
    config = {
        **describe_model(model),
        "data": {"name": source.name, "spec": source.spec, "fingerprint": source.fingerprint},
        "fit": settings,
        "version": fastgen.__version__,
    }
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signals())
        where = world(device)
        stack.enter_context(torch.random.fork_rng([where.device] if where.device.type == "cuda" else []))
        stored = _read_state(run_dir, resume, config)
        where.wait()  # before the first process writes what the others look for
        trainer = _Trainer(model.to(where.device), source, where, settings)
        trainer.start(model.phases(), stored, run_dir.state if run_dir else Path())
        if trainer.step >= steps:
            result = _already_there(trainer, run_dir, steps)
        else:
            result = _loop(trainer, run_dir, config, stop, stack, stored is None, progress, tuple(hooks))
        for p in model.parameters():
            p.grad = None
        if trainer.ema is not None:
            model.load_state_dict(trainer.weights().state_dict())
        model.eval()
        where.wait()
        return result


def _already_there(trainer: _Trainer, run_dir: RunDir | None, steps: int) -> FitResult:
    path = None if run_dir is None else run_dir.path
    lines = log.read_metrics(run_dir.metrics) if run_dir is not None and run_dir.metrics.is_file() else []
    metrics = {name: value for name, value in (lines[-1] if lines else {}).items() if name != "step"}
    note = f"{path} is at step {trainer.step} already: nothing to do up to step {steps}"
    return FitResult(trainer.step, trainer.seconds, metrics, path, notes=(note,))


def _loop(
    trainer: _Trainer,
    run_dir: RunDir | None,
    config: dict[str, Any],
    stop: Callable[[], bool],
    stack: ExitStack,
    fresh: bool,
    progress: bool | None,
    hooks: tuple[Hook, ...],
) -> FitResult:
    """Train up to the last step or the first signal."""
    where, model = trainer.where, trainer.model
    options = config["fit"]
    steps, log_every, checkpoint_every = options["steps"], options["log_every"], options["checkpoint_every"]
    sample_every = checkpoint_every if options["sample_every"] is None else options["sample_every"]
    writes = run_dir is not None and where.main
    metrics_file: IO[str] | None = None
    board: log.TensorBoard | None = None
    pictures: log.Pictures | None = None
    if run_dir is not None and writes:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir.path, run_dir.samples):
            checkpoint.remove_leftovers(folder)
        run_dir.write_config(config)
        log.truncate_metrics(run_dir.metrics, trainer.logged)
        metrics_file = stack.enter_context(run_dir.metrics.open("a"))
        if options["tensorboard"]:
            board = log.TensorBoard(run_dir.tensorboard, trainer.logged + 1)
            stack.callback(board.close)
        pictures = log.Pictures(run_dir, model, trainer.seed)
    if fresh:
        trainer.save(run_dir, 0.0)

    show = where.main and (sys.stderr.isatty() if progress is None else progress)
    bar = stack.enter_context(
        tqdm(total=steps, initial=trainer.step, unit="step", desc="train", disable=not show, dynamic_ncols=True)
    )
    # On the CPU, alone, fetching the losses costs nothing; elsewhere a step must not wait for them.
    fetch_every = 1 if where.device.type == "cpu" and where.size == 1 else log_every
    key = trainer.first_key()
    begin, before = time.perf_counter(), trainer.seconds
    trainer.line_time = begin
    interrupted = False
    while trainer.step < steps and not interrupted:
        parts, key = trainer.one_step(key)
        step = trainer.step
        for hook in hooks:
            hook(State(step, model, parts))
        if where.size == 1:
            interrupted = step < steps and stop()
        elif step % log_every == 0 and step < steps:
            interrupted = where.any(stop())  # all processes must end at the same step
        last = interrupted or step == steps
        due = last or step % checkpoint_every == 0
        if due or step % fetch_every == 0 or step % log_every == 0:
            trainer.collect()
        if show:
            if trainer.window and not trainer.recent:
                bar.set_postfix_str(f"loss {next(iter(trainer.window.values()))[-1]:.4g}", refresh=False)
            bar.update()
        elapsed = before + time.perf_counter() - begin
        if last or step % log_every == 0:
            line = trainer.line(elapsed)
            if metrics_file is not None:
                metrics_file.write(json.dumps(line) + "\n")
                metrics_file.flush()
            if board is not None:
                board.add(line)
        if due:
            trainer.save(run_dir, elapsed)
        if pictures is not None and sample_every and (step == steps or step % sample_every == 0):
            pictures.samples(trainer.weights(), step)
    if pictures is not None:
        pictures.losses()
    trainer.seconds = before + time.perf_counter() - begin
    metrics = {name: value for name, value in trainer.last_line.items() if name != "step"}
    notes = tuple(pictures.notes) if pictures is not None else ()
    path = None if run_dir is None else run_dir.path
    return FitResult(trainer.step, trainer.seconds, metrics, path, interrupted, notes)


def resume(
    dir: str | Path,
    *,
    steps: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    hooks: Iterable[Hook] = (),
) -> FitResult:
    """Go on with the run in a directory; model, data and arguments come from its ``config.json``.

    Args:
        dir: the run directory.
        steps: when to stop, counted from the very first step; None for what the run was started with.
        device, progress, hooks: as in :func:`fit`.

    Raises:
        FileNotFoundError, ValueError: no run is there, or one that cannot be taken up from its files alone.
    """
    run_dir = RunDir(Path(dir))
    config = run_dir.read_config()
    if not run_dir.state.is_file():
        raise FileNotFoundError(f"cannot resume {run_dir.path}: state.safetensors is missing")
    spec = config["data"]["spec"]
    if spec is None:
        raise ValueError(
            f"cannot resume {run_dir.path} from its files alone: its data came from Python; "
            "call fastgen.fit(model, data, ..., resume=True) with them"
        )
    options = {**config["fit"], **({} if steps is None else {"steps": steps})}
    model = run_dir.create_model()
    return fit(model, spec, out=dir, resume=True, device=device, progress=progress, hooks=hooks, **options)
