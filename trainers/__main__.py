"""python -m trainers CONFIG.yaml [path=value ...]: the same loop, bare. Also under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Train CONFIG in this process; exit codes as `orchestrate train`: 0 done, 2 bad input, 3 failed, 75 resumable."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers",
        description="Train one run in this process (or under torchrun), without Ray and MLflow. "
        "The same command goes on where it stopped.",
        epilog="example: python -m trainers mine.yaml --run-dir runs/mine budget.steps=300 optim.lr=1e-3",
    )
    parser.add_argument("config", help="a YAML file as `orchestrate show` prints it, or the name of a preset")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings by path")
    parser.add_argument("--run-dir", type=Path, default=None, help="the run's folder (default: runs/bare-NAME)")
    options = parser.parse_intermixed_args(arguments)

    from trainers.errors import Superseded, TrainingFailed, UserError

    try:
        return run(options.config, options.overrides, options.run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, Superseded) as error:
        print(f"training failed: {error}", file=sys.stderr)
        return 3


def run(source: str, overrides: list[str], run_dir: Path | None) -> int:
    from trainers.config_io import build_config, dump_yaml, load_yaml, override
    from trainers.errors import ConfigError
    from trainers.presets import PRESETS

    if source in PRESETS:
        config = PRESETS[source]()
    elif Path(source).is_file():
        config = build_config(load_yaml(Path(source).read_text(encoding="utf-8")))
    else:
        raise ConfigError(f"{source!r} is neither a file nor a preset. Presets: {', '.join(PRESETS)}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = override(config, [f"workers={world_size}", *overrides])

    from trainers.context import LocalContext
    from trainers.loop import train

    if world_size > 1:
        import torch
        import torch.distributed as dist

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    ctx = LocalContext(run_dir or Path("runs") / f"bare-{Path(source).stem}")
    try:
        ctx.stop_on_signals()
        if ctx.rank == 0:
            (ctx.run_dir / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        outcome = train(config, ctx)
    finally:
        ctx.close()
    if ctx.rank == 0:
        print(f"{outcome.state} ({outcome.reason}) at step {outcome.step}: {ctx.run_dir}")
        for name, value in sorted(outcome.metrics.items()):
            print(f"  {name:24} {value:.6g}")
    return 75 if outcome.state == "stopped" else 0


if __name__ == "__main__":
    sys.exit(main())
