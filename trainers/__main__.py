"""python -m trainers CONFIG.yaml [path=value ...]: the same loop, bare. Also under torchrun.

Imports nothing heavy before it knows what to do: `--help` and a bad configuration answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.config import RunConfig
    from trainers.context import LocalContext
    from trainers.progress import Outcome

DONE, BAD_INPUT, FAILED, STOPPED = 0, 2, 3, 75
OUTCOME = "outcome.json"


def main(arguments: list[str] | None = None) -> int:
    """Train CONFIG in this process; exit codes as `orchestrate train`: 0 done, 2 bad input, 3 failed, 75 resumable."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers",
        description="Train one run in this process (or under torchrun), without Ray and MLflow. "
        "The same command goes on where it stopped.",
        epilog="example: python -m trainers mine.yaml --run-dir runs/mine budget.steps=300 optim.lr=1e-3",
    )
    parser.add_argument(
        "config", help="a YAML file, as `orchestrate show` prints it or in the guide's words, or the name of a preset"
    )
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings by path")
    parser.add_argument("--run-dir", type=Path, default=None, help="the run's folder (default: runs/bare-NAME)")
    options = parser.parse_intermixed_args(arguments)

    from trainers.errors import Superseded, TrainingFailed, UserError
    from trainers.openmp import spin_briefly

    spin_briefly()
    try:
        config = configuration(options.config, options.overrides)
        outcome = run(config, options.run_dir or Path("runs") / f"bare-{Path(options.config).stem}")
    except UserError as error:
        return _say(f"error: {error}", BAD_INPUT)
    except TrainingFailed as error:
        return _say(f"training failed: {error}", FAILED)
    except Superseded as error:
        return _say(f"stopped: a newer command has taken this run over. {error}", STOPPED)
    return STOPPED if outcome.state == "stopped" else DONE


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code


def configuration(source: str, overrides: list[str]) -> RunConfig:
    """The configuration of a preset or a file, ours or the guide's, with the overrides. Raises ConfigError."""
    from trainers.config_io import build_config, override, read_yaml
    from trainers.errors import ConfigError
    from trainers.guide import is_guide, translate
    from trainers.presets import preset

    if Path(source).is_file() or source.endswith((".yaml", ".yml")):
        data = read_yaml(Path(source))
        if is_guide(data):
            data, notes = translate(data)
            for note in notes:
                _say(note, DONE)
        config = build_config(data)
    else:
        config = preset(source)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = override(config, [f"workers={world_size}", *overrides])
    if config.workers != world_size:
        raise ConfigError(
            f"workers={config.workers}: here are {world_size} processes. Leave workers out, and start as many with "
            f"torchrun --nproc-per-node {config.workers} -m trainers ..."
        )
    return config


def run(config: RunConfig, run_dir: Path) -> Outcome:
    """Train `config` in `run_dir` from wherever the run there stands.

    Raises UserError, TrainingFailed and Superseded as `train` does; outcome.json tells of the first two.
    """
    from trainers.context import LocalContext
    from trainers.errors import TrainingFailed, UserError
    from trainers.loop import train

    identity = identify(config, run_dir)
    if config.workers > 1:
        import torch
        import torch.distributed as dist

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    ctx = LocalContext(run_dir)
    try:
        ctx.stop_on_signals()
        settle(config, identity, ctx)
        try:
            outcome = train(config, ctx)
        except (UserError, TrainingFailed) as error:
            end_in_failure(ctx, error)
            raise
    finally:
        ctx.close()
    if ctx.rank == 0:
        print(f"{outcome.state} ({outcome.reason}) at step {outcome.step}: {run_dir}")
        for name, value in sorted(outcome.metrics.items()):
            print(f"  {name:24} {value:.6g}")
    return outcome


def identify(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What identity.json will say of a run of `config`; reads its text and, where given, the run it starts from.

    Raises UserError for a text that cannot be read and for initial weights of another architecture.
    """
    from trainers.config_io import fingerprint, fingerprint_fields
    from trainers.data.prepare import data_hashes
    from trainers.deepspeed_config import tuned_by
    from trainers.initial import initial_hash

    hashes = data_hashes(config, run_dir.parent / ".cache")
    what = (config, hashes, initial_hash(config, run_dir), tuned_by(config))
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": run_dir.name,
        "fingerprint": fingerprint(*what),
        "fields": fingerprint_fields(*what),
        "init_from": config.init_from,
    }


def settle(config: RunConfig, identity: dict[str, Any], ctx: LocalContext) -> None:
    """Make sure that the folder is this run's or nobody's, and write down whose it is: config.yaml, identity.json.

    Raises ConfigError with the fields that differ where it is another run's, or where a larger budget would have
    given the steps already taken another learning rate.
    """
    from trainers.config_io import differences, dump_yaml
    from trainers.errors import ConfigError
    from trainers.identity import (
        IDENTITY,
        only_more_budget,
        read_json,
        refuse_more_after_its_end,
        refuse_rewritten_past,
        stored_identity,
    )

    stored, fields = stored_identity(ctx.run_dir, "move it away or choose another --run-dir."), identity["fields"]
    if stored is not None:
        if not only_more_budget(stored["fields"], fields):
            changed = "\n  ".join(differences(stored["fields"], fields))
            raise ConfigError(
                f"{ctx.run_dir} holds a run with another configuration (left: the run, right: this command):\n"
                f"  {changed}\nChoose another --run-dir, or repeat the run's own settings to continue it."
            )
        if stored["fields"] != fields:
            outcome = read_json(ctx.run_dir / OUTCOME)
            refuse_more_after_its_end(ctx.run_dir.name, outcome, f"init_from={ctx.run_dir}")
        refuse_rewritten_past(config, stored["fields"], fields)
        identity = {**identity, **stored, "fingerprint": identity["fingerprint"], "fields": fields}
    if ctx.rank == 0:
        (ctx.run_dir / OUTCOME).unlink(missing_ok=True)  # it tells how the attempt before ended
        _write(ctx.run_dir / "config.yaml", dump_yaml(config))
        _write(ctx.run_dir / IDENTITY, json.dumps(identity, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Either the old content or the new one, whatever is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def end_in_failure(ctx: LocalContext, error: Exception) -> None:
    """outcome.json says why; the first rank to fail has the cause, and what the others say follows from it."""
    from trainers.errors import UserError
    from trainers.progress import Outcome
    from trainers.record import last_row
    from trainers.run import write_outcome

    if not (ctx.run_dir / OUTCOME).exists():
        kind = "bad_input" if isinstance(error, UserError) else "training_failed"
        row = last_row(ctx.run_dir / "metrics.jsonl") or {}
        write_outcome(ctx, Outcome("failed", f"{kind}: {error}", row.get("step", 0), row.get("tokens", 0), {}))


if __name__ == "__main__":
    sys.exit(main())
