"""Who may import whom (ARCHITECTURE.md), read from the source by ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainers", "search_spaces", "orchestrator", "cluster")

# package -> what none of its files may import, not even inside a function
FORBIDDEN: dict[str, set[str]] = {
    "trainers": {
        *("orchestrator", "search_spaces", "cluster", "benchmarks", "tests"),
        *("ray", "mlflow", "rich", "typer", "matplotlib"),
    },
    "search_spaces": {
        *("orchestrator", "cluster", "benchmarks", "tests"),
        *("ray", "mlflow", "torch", "numpy", "rich", "typer", "matplotlib"),
    },
    "orchestrator": {"benchmarks", "tests"},
    "cluster": {"trainers", "search_spaces", "orchestrator", "benchmarks", "tests", "mlflow", "torch", "numpy"},
}
# library -> the only files that may import it; cluster speaks to `ray job submit`
DOORS: dict[str, tuple[str, ...]] = {
    "mlflow": ("orchestrator/tracking.py", "orchestrator/tracked.py"),
    "matplotlib": ("orchestrator/plots.py", "orchestrator/finder_plots.py", "orchestrator/sweeps/figures"),
    "ray": (
        *("orchestrator/ray_cluster.py", "orchestrator/ray_trainer.py", "orchestrator/worker.py"),
        *("orchestrator/sweeps/tuning.py", "cluster/"),
    ),
    "deepspeed": ("trainers/deepspeed_engine.py", "trainers/deepspeed_state.py"),
    "bitsandbytes": ("trainers/optim_8bit.py", "trainers/nf4.py"),
    "peft": ("trainers/adapters.py",),
}
# imported by trainers only inside the function that needs it
OPTIONAL = {"tokenizers", "sentencepiece", "datasets", "pyarrow", "zstandard", "deepspeed", "bitsandbytes", "peft"}
# no torch and no numpy: valid or invalid alike on every machine, in milliseconds
PLAIN = (
    *("compatibility", "config", "config_engine", "config_fields", "config_model", "config_data", "config_training"),
    *("config_io", "config_paths", "deepspeed_config", "deepspeed_file"),
    *("yaml12", "presets", "guide", "guide_words"),
    *("budget", "schedules", "identity", "errors"),
)
# the modules of trainers that search_spaces knows
KNOWN_TO_SPACES = (
    *("trainers.config", "trainers.compatibility", "trainers.errors", "trainers.presets", "trainers.yaml12"),
)
# the only file of trainers/data that may import torch at run time: text is prepared without it
DATA_WITH_TORCH = "trainers/data/loader.py"

# the only file of orchestrator that knows the package cluster, and only when something is submitted
EDGE = "orchestrator/verbs/cluster.py"


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool
    """inside a function, or for type checkers alone"""
    typing: bool
    """for type checkers alone"""


def imports(source: str) -> Iterator[Import]:
    yield from _imports(ast.parse(source), lazy=False, typing=False)


def _imports(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (Import(f"{module}.{alias.name}", child.lineno, lazy, typing) for alias in child.names)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            unseen = typing or _for_type_checkers(child)
            yield from _imports(child, lazy or function or unseen, unseen)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def violations(path: str, source: str) -> list[str]:
    """What a file at `path` (relative to the root) imports against the rules."""
    package, name = path.split("/")[0], path.removesuffix(".py")
    plain = any(name == f"trainers/{room}" or name.startswith(f"trainers/{room}/") for room in PLAIN)
    found = []
    data = path.startswith("trainers/data/") and path != DATA_WITH_TORCH
    for module, line, lazy, typing in imports(source):
        top = module.split(".")[0]
        reasons = [
            (module.startswith("."), "imports are absolute"),
            (top in FORBIDDEN[package], f"{package} may not know {top}"),
            (top in DOORS and not path.startswith(DOORS[top]), f"{top} has other doors: {DOORS.get(top)}"),
            (package == "trainers" and top in OPTIONAL and not lazy, f"{top} is optional: import it in a function"),
            (data and top == "torch" and not typing, f"of trainers/data only {DATA_WITH_TORCH} imports torch"),
            (plain and top in ("torch", "numpy"), f"{path} is plain: no {top}"),
            (package == "orchestrator" and top == "cluster" and (path != EDGE or not lazy),
             f"the edge to cluster is {EDGE}, inside functions"),
            (package == "search_spaces" and top == "trainers" and not module.startswith(KNOWN_TO_SPACES),
             f"search_spaces knows of trainers only {KNOWN_TO_SPACES}"),
        ]  # fmt: skip
        found += [f"{path}:{line}: {module}: {reason}" for broken, reason in reasons if broken]
    return found


def test_every_file_keeps_to_its_room() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > len(PLAIN)
    assert [line for file in files for line in violations(file.relative_to(ROOT).as_posix(), file.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "refused"),
    [
        ("trainers/loop.py", "import ray", True),
        ("trainers/loop.py", "def f():\n    from ray.train import report", True),
        ("trainers/loop.py", "from orchestrator.launch import launch", True),
        ("trainers/loop.py", "import torch", False),
        ("trainers/loop.py", "from trainers.data import tokenizers", False),
        ("trainers/loop.py", "from .data import loader", True),
        ("trainers/data/tokenizers.py", "import tokenizers", True),
        ("trainers/data/tokenizers.py", "def f():\n    import tokenizers", False),
        ("trainers/data/tokenizers.py", "if TYPE_CHECKING:\n    import tokenizers", False),
        ("trainers/data/tokenizers.py", "class A:\n    import tokenizers", True),
        ("trainers/data/tokenizers.py", "try:\n    import tokenizers\nexcept ImportError:\n    pass", True),
        ("trainers/data/loader.py", "import torch", False),
        ("trainers/data/stream.py", "def f():\n    import torch", True),
        ("trainers/data/types.py", "if TYPE_CHECKING:\n    import torch", False),
        ("trainers/budget.py", "def f():\n    import numpy", True),
        ("orchestrator/plots.py", "def f():\n    import matplotlib", False),
        ("orchestrator/samples.py", "def f():\n    from matplotlib.figure import Figure", True),
        ("trainers/config.py", "def f():\n    import torch", True),
        ("trainers/presets/codelm.py", "import numpy as np", True),
        ("trainers/configs_of_torch.py", "import torch", False),
        ("trainers/optim_8bit.py", "def f():\n    import bitsandbytes", False),
        ("trainers/engine.py", "def f():\n    import bitsandbytes", True),
        ("orchestrator/tracking.py", "import mlflow", False),
        ("orchestrator/plots.py", "def f():\n    import mlflow", True),
        ("orchestrator/ray_trainer.py", "import ray", False),
        ("orchestrator/cli.py", "def f():\n    import ray", True),
        ("search_spaces/space.py", "from trainers.config import RunConfig", False),
        ("search_spaces/space.py", "from trainers.errors import ConfigError", False),
        ("search_spaces/space.py", "from trainers.loop import train", True),
        ("search_spaces/space.py", "import trainers", True),
        ("cluster/submit.py", "from orchestrator import cli", True),
        ("cluster/submit.py", "from ray.job_submission import JobSubmissionClient", False),
        ("cluster/parcel.py", "from cluster.errors import SubmissionError", False),
        ("orchestrator/verbs/cluster.py", "def f():\n    from cluster.submit import Cluster", False),
        ("orchestrator/verbs/cluster.py", "from cluster.submit import Cluster", True),
        ("orchestrator/verbs/cluster.py", "import cluster", True),
        ("orchestrator/launch.py", "def f():\n    from cluster.submit import Cluster", True),
        ("orchestrator/cli.py", "from orchestrator.verbs import cluster", False),
    ],
)
def test_the_rules_refuse_what_breaks_them(path: str, source: str, refused: bool) -> None:
    assert bool(violations(path, source)) is refused


HEAVY = ("torch", "numpy", "ray", "mlflow")


def loaded_by(statement: str) -> set[str]:
    """The heavy libraries that a fresh process has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_configuration_loads_nothing_heavy() -> None:
    modules = ", ".join(f"trainers.{name}" for name in PLAIN)
    assert loaded_by(f"import {modules}") == set()
    assert loaded_by(f"import {modules}, numpy") == {"numpy"}


def test_search_spaces_load_nothing_heavy() -> None:
    rooms = [file.stem for file in (ROOT / "search_spaces").glob("*.py") if file.stem != "__init__"]
    assert loaded_by("import " + ", ".join(f"search_spaces.{room}" for room in rooms)) == set()


def test_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by("import orchestrator.cli") == set()


def test_the_driver_starts_without_torch() -> None:
    """Its import would delay the first step by seconds; the workers need it, the driver does not."""
    assert loaded_by("import orchestrator.launch") == {"numpy"}


def test_the_bare_loop_says_how_it_is_used_before_it_loads_anything_heavy() -> None:
    helped = "from trainers.__main__ import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    print()"
    assert loaded_by(helped).isdisjoint(HEAVY)
    assert loaded_by(f"{helped}\nimport trainers.loop") >= {"torch", "numpy"}


def test_text_is_prepared_without_torch() -> None:
    rooms = [file.stem for file in (ROOT / "trainers" / "data").glob("*.py") if file.stem not in ("__init__", "loader")]
    prepared = "import " + ", ".join(f"trainers.data.{room}" for room in rooms)
    assert loaded_by(prepared) == {"numpy"}
    assert loaded_by(f"{prepared}, trainers.data.loader") == {"numpy", "torch"}
