"""One training run, whole: from a config to an export, in plain order."""

import itertools
import logging
import math
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign import attention, card
from diffalign import checkpoint as disk
from diffalign.assemble import Parts, assemble, claim_folder, follow
from diffalign.checks import reference_kind
from diffalign.config import dump
from diffalign.data.batches import stream
from diffalign.data.buckets import describe
from diffalign.data.prefetch import ahead
from diffalign.errors import RunError
from diffalign.fit import NotFinite, StepReport, fit
from diffalign.grids import save_grid
from diffalign.guarding import watch
from diffalign.logbook import Logbook
from diffalign.models.save import export_full, export_lora
from diffalign.online_rounds import own_phases
from diffalign.plan import remedy
from diffalign.progress import Bar, bar
from diffalign.rounds import Phase, phases
from diffalign.settings import OptimizerSettings, TrainConfig
from diffalign.sharding import gather_optimizer, gathered, join_rows, local
from diffalign.types import Batch, RunningMean
from diffalign.validation import better, check_measure, movement, validate

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    export: Path
    step: int
    """Step of the exported weights."""


def run(cfg: TrainConfig) -> RunResult:
    """Trains as the config says, writes the run's folder, and exports what Diffusers loads.

    Raises:
        InputError: Something in the config, the data or the model is wrong; nothing was trained.
        RunError: The run failed; its last checkpoint is whole.
    """
    parts = assemble(cfg)
    claim_folder(parts)
    if parts.counts.buckets and parts.accelerator.is_main_process:
        log.info("%s", describe(parts.counts.buckets, parts.counts.cropped))
    parts.accelerator.init_trackers("diffalign")
    log_file = parts.folder / "metrics.jsonl"
    with Logbook(log_file, parts.accelerator, parts.metrics_offset) as book, attention.used(parts.attention):
        try:
            train(parts, book)
        except torch.OutOfMemoryError as error:
            last = max(disk.checkpoints(parts.folder / "checkpoints"), default=0)
            raise RunError(
                f"{parts.accelerator.device} is out of memory after the checkpoint of step {last}; {remedy(cfg)}"
            ) from error
        except compiler_errors(cfg) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"the network could not be compiled: {reason}; train.compile=false trains without"
            ) from error
    return export(parts)


def compiler_errors(cfg: TrainConfig) -> tuple[type[Exception], ...]:
    """What PyTorch raises where it cannot compile a network; nothing where the config compiles none."""
    if not cfg.train.compile:
        return ()
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def train(parts: Parts, book: Logbook) -> None:
    """The phases of a run, one where it has no rounds."""
    rewards = parts.rewards
    set_lr(parts, parts.start)
    made = phases(parts, book) if parts.online is None else own_phases(parts, book)
    while not ended(parts) and (phase := next(made, None)) is not None:
        rewards = take_steps(parts, phase, book, rewards)


def take_steps(parts: Parts, phase: Phase, book: Logbook, rewards: RunningMean) -> RunningMean:
    """The steps of a phase, with all that goes on between them; returns the running mean of implicit rewards."""
    cfg, t = parts.cfg, parts.cfg.train
    if phase.start == 0 and look(parts, phase, book, 0, rewards):
        save(parts, book, 0, rewards)
    main, line = parts.accelerator.is_main_process, ""
    with (
        kept_aside(parts),
        batches_of(parts, phase) as batches,
        bar("training", t.steps, shown=main, done=phase.start) as shown,
    ):
        for report in fit(
            phase.policy,
            phase.reference,
            cfg.method,
            batches,
            parts.optimizer,
            steps=phase.stop,
            accumulate=t.accumulate,
            max_grad_norm=t.max_grad_norm,
            seed=cfg.seed,
            start=phase.start,
            accelerator=parts.accelerator,
            rewards=rewards,
            old=phase.old,
            reads=lambda step: is_read(cfg, step, phase.stop),
        ):
            rewards = report.rewards
            follow(parts)
            if parts.ema is not None:
                parts.ema.step(local(parts.parameters.values()))
            if report.step % t.log_every == 0 or report.step == t.steps:
                book.step(report, parts.optimizer.param_groups[0]["lr"])
            set_lr(parts, report.step)
            wanted = look(parts, phase, book, report.step, rewards, shown)
            if wanted or report.step % cfg.checkpoint.every == 0 or report.step == phase.stop:
                save(parts, book, report.step, rewards)
            line = note(report) if report.metrics else line
            shown.advance(note=line)
            if ended(parts):
                break
    return rewards


@contextmanager
def batches_of(parts: Parts, phase: Phase) -> Iterator[Iterator[Batch]]:
    """The micro-batches of a phase; made one ahead for a GPU, where nothing but a cache is read for them.

    On a CPU a batch takes under 1 % of a step and a thread wins nothing; encoding wants the device itself.
    """
    t = parts.cfg.train
    endless = stream(
        phase.collator, batch_size=t.batch_size, accumulate=t.accumulate, share=parts.share, start_step=phase.start
    )
    batches = itertools.islice(endless, (phase.stop - phase.start) * t.accumulate)
    if parts.accelerator.device.type != "cuda" or parts.cfg.data.cache is False:
        yield batches
        return
    with closing(ahead(batches, pinned=True)) as coming:
        yield coming


def is_read(cfg: TrainConfig, step: int, stop: int) -> bool:
    """Whether a step's metrics are read: where they are written, and before anything is kept or judged."""
    every = [cfg.train.log_every, cfg.checkpoint.every]
    every += [section.every for section in (cfg.validation, cfg.samples, cfg.guard) if section is not None]
    return step == stop or any(step % n == 0 for n in every)


def look(parts: Parts, phase: Phase, book: Logbook, step: int, rewards: RunningMean, shown: Bar | None = None) -> bool:
    """Pictures, the guard and held-out pairs at the steps that have them; True where a checkpoint is wanted."""
    cfg = parts.cfg
    if cfg.samples is not None and step % cfg.samples.every == 0 and parts.accelerator.is_main_process:
        with exported_weights(parts):
            place, offload = parts.folder / "samples", cfg.train.offload
            save_grid(place, step, cfg.model, parts.family, parts.net, cfg.samples, offload=offload)
    wanted = False
    if parts.guard is not None and parts.guard.looks_at(step):
        with exported_weights(parts):
            wanted = watch(parts, parts.guard, book, step, shown)
    return validated(parts, phase, book, step, rewards) or wanted


def validated(parts: Parts, phase: Phase, book: Logbook, step: int, rewards: RunningMean) -> bool:
    """Held-out pairs at the steps that have them; True where the chosen measure was beaten."""
    cfg = parts.cfg
    if cfg.validation is None or phase.held is None or step % cfg.validation.every:
        return False
    result = validate(
        parts.policy,
        phase.reference,
        cfg.method,
        phase.held,
        batch_size=cfg.train.batch_size,
        share=parts.share,
        accelerator=parts.accelerator,
        rewards=rewards,
        together=cfg.train.shard,
    )
    book.validation(step, result)
    first = book.first_validation()
    moved = None if first is None else movement(first, result)
    if moved is not None and moved.displaced and step:
        log.warning("step %d: %s", step, moved.sentence)
    measure = cfg.checkpoint.best
    if measure is None:
        return False
    check_measure(measure, result.metrics)
    if step == 0 or not better(measure, result.metrics[measure], parts.best.value):
        return False
    parts.best.value, parts.best.step = result.metrics[measure], step
    return True


def save(parts: Parts, book: Logbook, step: int, rewards: RunningMean) -> None:
    """A checkpoint of `step`; older ones beyond `keep_last` go, the best one and what the guard goes back to stay."""
    root, guard = parts.folder / "checkpoints", parts.guard
    state = state_of(parts, step, book.offset if step else 0, rewards)  # a run from the start writes all lines anew
    whole = guard.standing.whole if guard is not None and guard.rolls_back else None
    if parts.accelerator.is_main_process:
        with disk.enough_room(root, root):
            disk.save_checkpoint(root, state)
        disk.prune(root, keep_last=parts.cfg.checkpoint.keep_last, keep=(parts.best.step, whole))
    parts.accelerator.wait_for_everyone()


def state_of(parts: Parts, step: int, metrics_offset: int, rewards: RunningMean) -> disk.Checkpoint:
    """Everything that `restore` needs, on the main process; all of a sharded run must call this."""
    keep = parts.accelerator.is_main_process
    moves = parts.reference is not None and reference_kind(parts.cfg) == "ema"
    scaler = parts.accelerator.scaler
    ema = parts.ema
    return disk.Checkpoint(
        step=step,
        weights=gathered(parts.parameters, keep=keep),
        optimizer=gather_optimizer(parts.optimizer.state_dict(), keep=keep),
        ema=None if ema is None else gathered(join_rows(ema.shadow_params, parts.parameters), keep=keep),
        reference=gathered(parts.reference.parameters, keep=keep) if moves and parts.reference is not None else None,
        state={
            "metrics_offset": metrics_offset,
            "best": asdict(parts.best),
            "guard": None if parts.guard is None else asdict(parts.guard.standing),
            "rewards": rewards.numbers(),
            "scaler": None if scaler is None else scaler.state_dict(),
        },
    )


def export(parts: Parts) -> RunResult:
    """Writes `export/` and the model card, from the checkpoint that was chosen if there is one."""
    cfg, folder = parts.cfg, parts.folder
    out = folder / "export"
    step, chosen = last_step(parts), chosen_step(parts)
    kept = disk.checkpoints(folder / "checkpoints").get(chosen)
    if kept is None and ended(parts):
        raise RunError(f"{folder / 'checkpoints'} must hold step-{chosen}, which the guard ended the run with")
    if kept is not None and chosen != step:
        step = chosen
        found = disk.load_checkpoint(kept)
        disk.restore_(parts.parameters, found.weights if found.ema is None else found.ema)
    elif parts.ema is not None:
        parts.ema.copy_to(local(parts.parameters.values()))
    full = cfg.train.trainable == "full"
    state = gathered(parts.net.state_dict(), keep=parts.accelerator.is_main_process) if full else {}
    if parts.accelerator.is_main_process:
        with disk.enough_room(out, folder / "checkpoints"):
            if full:
                export_full(parts.net, parts.family, out, dtype=getattr(torch, cfg.export.dtype), state=state)
            else:
                export_lora(parts.net, parts.family, out)
            text = card.model_card(cfg, dump(cfg), parts.family, parts.counts, step, folder)
            (out / "README.md").write_text(text, encoding="utf-8")
            shutil.copyfile(out / "README.md", folder / "README.md")
        if cfg.export.push_to_hub is not None:
            push(out, cfg.export.push_to_hub)
    parts.accelerator.wait_for_everyone()
    return RunResult(folder=folder, export=out, step=step)


def ended(parts: Parts) -> bool:
    """The guard has ended the run."""
    return parts.guard is not None and parts.guard.over


def last_step(parts: Parts) -> int:
    """Step of the weights as they are."""
    return parts.guard.standing.looked if parts.guard is not None and parts.guard.over else parts.cfg.train.steps


def chosen_step(parts: Parts) -> int:
    """Step of the weights that are exported: where the guard goes back to, the best by a measure, or the last."""
    guard = parts.guard
    if guard is not None and guard.over and guard.rolls_back:
        return guard.standing.whole
    return parts.best.step or last_step(parts)


def push(folder: Path, name: str) -> None:
    """Uploads an export to the hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a diffalign run")


def lr_factor(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Share of the learning rate after `step` steps: linear warm-up, then constant, linear or cosine decay."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_lr(parts: Parts, step: int) -> None:
    """Sets the learning rate for the step after `step` steps."""
    o = parts.cfg.optimizer
    for group in parts.optimizer.param_groups:
        group["lr"] = o.lr * lr_factor(o, step, parts.cfg.train.steps)


def note(report: StepReport) -> str:
    """Loss, and for pairs accuracy and margin, and speed, for the progress line."""
    m = report.metrics
    words = [f"loss {m['loss']:.4f}"]
    if "rewards/margins" in m:
        words += [f"acc {m['rewards/accuracies']:.2f}", f"margin {m['rewards/margins']:+.3f}"]
    return " ".join([*words, f"{report.samples / report.seconds:.1f}/s"])


@contextmanager
def exported_weights(parts: Parts) -> Iterator[None]:
    """Inside, the network has the weights that an export would have: the moving average if there is one."""
    if parts.ema is None:
        yield
        return
    parts.ema.store(parts.parameters.values())
    parts.ema.copy_to(parts.parameters.values())
    try:
        yield
    finally:
        parts.ema.restore(parts.parameters.values())


@contextmanager
def kept_aside(parts: Parts) -> Iterator[None]:
    """A batch whose loss is not finite is written to the run's folder before the run ends."""
    try:
        yield
    except NotFinite as error:
        file = parts.folder / f"bad-batch-{parts.share.mine}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in error.batch.tensors().items()}, file)
        raise RunError(f"{error}, the batch is saved in {file}") from error


def load_run(folder: str | Path) -> dict[str, object]:
    """The resolved config of a run, as a table."""
    return tomllib.loads((Path(folder) / "config.toml").read_text())
