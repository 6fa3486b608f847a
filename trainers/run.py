"""Run: everything one rank holds while it trains, and how that goes into a checkpoint and comes back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from trainers.base_weights import base_checkpoint, check_base, identified, keep_base
from trainers.census import CENSUS, Sizes, gradient_sizes, take_census
from trainers.checkpoint import Checkpoint, CheckpointStore
from trainers.collective import collective
from trainers.config import ModelConfig, RunConfig
from trainers.context import GIVEN_UP, RunContext
from trainers.data.prepare import prepare
from trainers.data.tokenizers import save_once
from trainers.data.types import Batch
from trainers.devices import check_machine, resolve_device, set_tf32
from trainers.diagnosis import account
from trainers.engines import build_engine, engine_name
from trainers.environment import environment, explain_difference
from trainers.errors import CheckpointError, NonFinite
from trainers.evaluate import evaluate
from trainers.incidents import Update
from trainers.initial import initial_checkpoint
from trainers.meter import Meter
from trainers.models import apply_switches
from trainers.models.state import LanguageModel
from trainers.objectives import build_objective
from trainers.phase import ActivePhase, open_phase
from trainers.progress import Outcome, Progress
from trainers.record import MetricsRecord
from trainers.samples import write_samples
from trainers.seeds import restore_rng, rng_tensors, seed_everything, stream_seed
from trainers.streams import Streams, carries_streams
from trainers.weights import prepare_weights

State = dict[str, torch.Tensor]

EVALUATION_ROWS = 16  # windows scored at a time; part of the result of stateful models, so alike for any world size


class Run:
    """Built in one fixed order: device, seeds, data, model, engine, files."""

    def __init__(self, config: RunConfig, ctx: RunContext, build: Callable[[ModelConfig, int], nn.Module]):
        self.config = config
        self.ctx = ctx
        self.rank = ctx.rank
        self.phases = config.resolved_phases()
        self.progress = Progress()

        self.device = resolve_device(config.device, ctx.local_rank)
        check_machine(config, self.device)
        if self.device.type == "cuda":
            set_tf32(config.precision.tf32)
            torch.cuda.set_device(self.device)
        self.peers = collective(ctx.world_size)

        self.data = prepare(config, ctx.cache_dir, run_dir=ctx.run_dir)
        adapts = config.precision.adapter_rank > 0
        self._base = base_checkpoint(ctx.run_dir, config.init_from) if adapts else None
        torch.manual_seed(stream_seed(config.seed, "model"))
        self.model = build(config.model, self.data.tokenizer.vocab_size)
        prepare_weights(self.model, config.precision, self._base)
        seed_everything(config.seed, ctx.rank)
        self.objective = build_objective(config, self.phases[0])
        self.engine = build_engine(config, self.model.to(self.device), self.device, ctx.world_size)
        self.streams = Streams(
            cast(LanguageModel, self.model), config.micro_sequences, config.accumulation, self.device
        )
        self.store = CheckpointStore(
            ctx.run_dir / "checkpoints",
            ctx.guard,
            rank=ctx.rank,
            world_size=ctx.world_size,
            keep_last_n=config.checkpoint.keep_last_n,
            save_best=config.checkpoint.save_best,
            on_disk_full=config.checkpoint.on_disk_full,
            warn=ctx.note,
        )
        self.record: MetricsRecord | None = None
        self._environment = environment(self.device, ctx.world_size, config.compile, engine_name(config))
        self._constant_meta = {
            "environment": self._environment,
            "model": config.model.model_dump(),
            "vocab_size": config.model.vocab_size or self.data.tokenizer.vocab_size,
            "tokenizer": self.data.tokenizer.fingerprint,
            **({"base": identified(self._base)} if self._base else {}),
        }
        self._resumed_in_phase: Checkpoint | None = None
        self._last_save = time.monotonic()
        self.meter = Meter(self.device)

    # ---- resume ---------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go back to the newest sound checkpoint, or start from `init_from`, or from scratch."""
        if self.rank == 0:
            self.store.prune_staging()
            if self._base is not None:
                keep_base(self._base, self.ctx.run_dir)
        newest = self.store.latest() if self.rank == 0 else None
        step = self.peers.from_first(newest.step if newest else None)
        checkpoint = newest if self.rank == 0 else (self.store.at(step) if step is not None else None)
        if checkpoint is not None:
            self._restore_from(checkpoint)
        elif self.config.init_from is not None:
            self._start_from(Path(self.config.init_from))
        if self.rank == 0:
            save_once(self.data.tokenizer, self.ctx.run_dir / "tokenizer")
            self.record = MetricsRecord(
                self.ctx.run_dir / "metrics.jsonl",
                self.ctx.guard,
                resume_step=self.progress.step,
                warn=self.ctx.note,
            )
            self.store.before_commit = self.record.sync  # rows up to a checkpoint cannot be replayed after it
        self.store.reserve(self._files())

    def _restore_from(self, checkpoint: Checkpoint) -> None:
        meta = checkpoint.meta
        if meta["tokenizer"] != self.data.tokenizer.fingerprint:
            raise CheckpointError(
                f"{checkpoint.path} was trained with another tokenizer than the one its text gives now: its ids would "
                f"mean other text. Restore the package versions of its config (MLflow's version.* tags), or start anew."
            )
        if self._base is not None:
            check_base(meta.get("base"), self._base, checkpoint.path)
        self.progress = Progress.from_json(meta["progress"])
        for sentence in explain_difference(meta["environment"], self._environment):
            self.ctx.note(sentence)
        self.engine.begin_phase(self.phases[self.progress.phase].optim, keep_optimizer=False)
        files = {stem: checkpoint.load(stem) for stem in ("model", "optimizer")}
        self.engine.load(files, meta["engine"], optimizer=True)
        self._restore_own(checkpoint)
        self._resumed_in_phase = checkpoint

    def _restore_own(self, checkpoint: Checkpoint) -> None:
        """This rank's generators and streams; a rank that there was not keeps the generators it was seeded with.

        Raises CheckpointError where another number of workers would have to share out streams that rows go on from.
        """
        if checkpoint.world_size != self.ctx.world_size and carries_streams(checkpoint.load("rank-00000")):
            raise CheckpointError(
                f"{checkpoint.path} holds the runtime state of the rows of {checkpoint.world_size} workers, which "
                f"{self.ctx.world_size} cannot share out: start it with --workers {checkpoint.world_size}, or begin "
                f"another run with --init-from."
            )
        own = f"rank-{self.rank:05d}"
        if own in checkpoint.stems:
            tensors = checkpoint.load(own)
            restore_rng(tensors)
            self.streams.load(tensors)

    def _start_from(self, run_dir: Path) -> None:
        """Weights of a finished run; everything else is new."""
        if self.rank == 0 and (unknown := self.data.report["tokenizer"].get("unknown")):
            self.ctx.note(unknown)
        if self._base is not None:  # the weights are there, under the adapters
            return
        source = initial_checkpoint(run_dir)
        self.engine.load({"model": source.load("model")}, {}, optimizer=False)

    # ---- phases ---------------------------------------------------------------------------------

    def open_phase(self) -> ActivePhase:
        """The present phase, at the step where the run stands."""
        spec = self.phases[self.progress.phase]
        phase = open_phase(self.config, spec, self.data.phases[spec.index], self.rank, self.ctx.world_size)
        apply_switches(self.model, spec.model)
        self.objective = build_objective(self.config, spec)
        resumed, self._resumed_in_phase = self._resumed_in_phase, None
        if resumed is not None:
            loader_state = resumed.meta["loader"]
            phase.loader.restore(loader_state)
        else:
            if spec.index > 0:
                self.engine.begin_phase(spec.optim, keep_optimizer=spec.hand_over == "optimizer")
            self.streams.begin()
        self.model.train()
        self.meter.start(self.progress.tokens)
        return phase

    def close_phase(self, phase: ActivePhase) -> None:
        """Go on to the next phase; the last one leaves the run where it is."""
        if phase.spec.index + 1 < len(self.phases):
            self.progress.next_phase()
        else:
            self.progress.phase = len(self.phases)

    # ---- between steps --------------------------------------------------------------------------

    def agree(self, targets: int) -> tuple[int, str | None, bool]:
        """The step's targets over all ranks, and whether all stop or save now: one small CPU collective."""
        reason = self.ctx.should_stop()
        minutes = self.config.checkpoint.every_minutes
        due = self.rank == 0 and minutes is not None and time.monotonic() - self._last_save > minutes * 60
        total, stops, saves = self.peers.sum((targets, reason is not None, due))
        if stops:  # a request may have come between two ranks' looks; they act on the reason, so it must be one
            reason = self.peers.from_any(reason)
        return int(total), reason, bool(saves)

    def watch(self, phase: ActivePhase, update: Update, batches: Sequence[Batch], *, logging: bool) -> str | None:
        """Apply the non-finite policy to what the update met: a reason to save and stop, TrainingFailed, or nothing.

        The bad update was left out on every rank. On an accelerator the counters are read on logging steps only.
        """
        if not self.engine.skipped.should_check(update, logging=logging):
            return None
        policy = phase.spec.optim
        run_of_them = self.engine.skipped.take_longest()
        if run_of_them == 0:
            return None
        self._write(phase, {"incidents/nonfinite": self.engine.skipped.total()})
        known = not self.engine.decides_on_device
        what = f"the loss or a gradient was not finite {'at' if known else 'at or before'} step {self.progress.step}"
        ends = policy.on_nonfinite != "skip" or run_of_them >= policy.nonfinite_limit
        looked = known and (run_of_them == 1 or ends)  # a long row of them is not looked into again and again
        where = f" {account(self, phase, batches)}." if looked else ""
        self.ctx.note(f"{what} (policy {policy.on_nonfinite}); the update was left out.{where}")
        if policy.on_nonfinite == "raise":
            raise NonFinite(f"{what}.{where} Lower optim.lr or set optim.on_nonfinite=skip.")
        if run_of_them >= policy.nonfinite_limit:
            raise NonFinite(f"{what}, {run_of_them} in a row.{where} The last good checkpoint stands; lower optim.lr.")
        return "nonfinite" if policy.on_nonfinite == "stop" else None

    def gradient_sizes(self) -> Sizes:
        """Bytes of the gradients by dtype, to be asked for between the backward and the update."""
        return gradient_sizes(self.engine.gradients())

    def tell_census(self, phase: ActivePhase, gradients: Sizes) -> None:
        """Print, record and write down what the tensors are after the first update."""
        census = take_census(self.model, self.engine.optimizer, gradients, self.engine.masters())
        self._write(phase, census.metrics())
        if self.rank == 0:
            (self.ctx.run_dir / CENSUS).parent.mkdir(exist_ok=True)
            _write_json(self.ctx, self.ctx.run_dir / CENSUS, census.to_json())
            self.ctx.note(census.sentences(self.config.precision, phase.spec.optim))

    def log_step(self, phase: ActivePhase, loss: torch.Tensor, targets: int, lr: float, update: Update) -> None:
        """Write this step's training metrics (waits for the device: only on logging steps)."""
        (total,) = self.peers.sum((loss.item(),))
        if self.record is None:
            return
        metrics = {
            "train/loss": total / targets,
            "train/lr": lr,
            "train/grad_norm": float(update.grad_norm),
            **self.meter.read(self.progress.tokens),
        }
        self._write(phase, metrics)

    def evaluate(self, phase: ActivePhase) -> bool:
        """Score the validation text, judge early stopping, write samples; True when it is the best of the phase."""
        with self.meter.pause():
            return self._evaluate(phase)

    def _evaluate(self, phase: ActivePhase) -> bool:
        with self.engine.whole() as model:
            return self._evaluate_with(model, phase)

    def _evaluate_with(self, model: nn.Module, phase: ActivePhase) -> bool:
        started = time.perf_counter()
        metrics = evaluate(
            model,
            phase.data.validation,
            sequence_length=self.config.sequence_length,
            rows=EVALUATION_ROWS,
            device=self.device,
            precision=self.config.precision,
            max_tokens=self.config.evaluation.max_tokens,
            rank=self.rank,
            world_size=self.ctx.world_size,
            objective=self.objective,
        )
        metrics = self.peers.from_first(metrics)  # one verdict: ranks that differed by a bit could part ways
        improved = self.progress.judge(metrics, self.config.early_stopping)
        metrics["perf/evaluation_s"] = time.perf_counter() - started
        self._write(phase, metrics)
        if self.rank == 0 and self.config.samples.count:
            write_samples(
                self.config.samples,
                self.config.seed,
                model,
                self.data.tokenizer,
                phase.data.validation,
                self.ctx.run_dir / "samples" / f"step-{self.progress.step:08d}.json",
            )
        return improved and self.config.checkpoint.save_best

    def report(self) -> None:
        """Tell whoever started the run of an evaluation; after the save that goes with it. Collective."""
        self.ctx.report({"step": self.progress.step, "tokens": self.progress.tokens, **self.progress.last})

    def _write(self, phase: ActivePhase, metrics: dict[str, float]) -> None:
        self.progress.last.update(metrics)
        if self.record is not None:
            diverged = self.record.append(self.progress.step, self.progress.tokens, phase.name, metrics)
            if diverged:
                self.ctx.note(f"step {self.progress.step}: {diverged} replayed values differ from the record")

    # ---- checkpoints ----------------------------------------------------------------------------

    def save(self, phase: ActivePhase, *, best: bool = False, wait: bool = False) -> None:
        """Snapshot now; commit in the background unless `wait`."""
        self._last_save = time.monotonic()
        meta = {
            "progress": self.progress.to_json(),
            "engine": self.engine.state(),
            "loader": phase.loader.state(),
            "tracking": self.ctx.tracking,
            **self._constant_meta,
        }
        self.store.save(self.progress.step, self._files(), meta, best=best, wait=wait)

    def _files(self) -> dict[str, State]:
        """What this rank puts into a checkpoint: live tensors by file and name."""
        own = {f"rank-{self.rank:05d}": {**rng_tensors(), **self.streams.tensors()}}
        return {**self.engine.saved(), **own}

    # ---- endings --------------------------------------------------------------------------------

    def stop(self, phase: ActivePhase, reason: str) -> Outcome:
        """Save where the run stands, unless it is given up, and say how it ended."""
        if self.progress.step and reason not in GIVEN_UP:
            self.save(phase, wait=True)
        return self._end("stopped", reason)

    def finish(self) -> Outcome:
        """The end of the last phase; only a run whose last state is on the disk is finished."""
        lost = not self.store.wait()
        if any(self.peers.sum((lost,))):
            return self._end("stopped", "the last checkpoint could not be saved")
        stopped_early = self.progress.phase_over
        return self._end("finished", "early_stopping" if stopped_early else "completed")

    def _end(self, state: str, reason: str) -> Outcome:
        last = {**self.progress.last, **self.meter.peak()}
        outcome = Outcome(state, reason, self.progress.step, self.progress.tokens, last)
        if self.rank == 0:
            self._finish_record(state)
            write_outcome(self.ctx, outcome)
        return outcome

    def _finish_record(self, state: str) -> None:
        """The rows come before the word that the run has ended; without them it has not finished."""
        assert self.record is not None
        try:
            self.record.sync()
        except OSError as error:
            if state == "finished":
                raise
            self.ctx.note(f"rows since the last checkpoint could not be written ({error}); the next attempt makes them")

    def close(self) -> None:
        """Let a save in flight become durable, whatever ended the loop."""
        self.store.close()
        if self.record is not None:
            self.record.close()
        self.engine.close()

    def to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return replace(
            batch,
            tokens=batch.tokens.to(self.device, non_blocking=True),
            targets=batch.targets.to(self.device, non_blocking=True),
        )


def write_outcome(ctx: RunContext, outcome: Outcome) -> None:
    """outcome.json, atomically and only while the claim is ours."""
    _write_json(ctx, ctx.run_dir / "outcome.json", outcome.to_json())


def _write_json(ctx: RunContext, path: Path, value: Mapping[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    with ctx.guard.held():
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
        os.replace(temporary, path)
