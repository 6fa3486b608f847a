"""`orchestrate`, also as `python -m orchestrator`: Ctrl-C is no traceback even before the command line is loaded."""

import sys


def main() -> int:
    """The exit code of `orchestrator.cli.main`; 130 for a Ctrl-C that comes before there is one."""
    try:
        from orchestrator.cli import main as command_line

        return command_line()
    except KeyboardInterrupt:  # nothing has begun
        print("stopped: by Ctrl-C.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
