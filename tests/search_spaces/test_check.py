"""`check` says everything that is wrong with a space, and lets through only what can start."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import precisions
from search_spaces.check import check
from search_spaces.precisions import Device
from search_spaces.space import Axis, Choice, Domain, Float, Int, Space, When
from search_spaces.trial import trial_config
from trainers.config import RunConfig
from trainers.config_io import override
from trainers.errors import ConfigError
from trainers.presets import preset

SMALL = preset("fundamentallm/small")
TWO = preset("fundamentallm/two-phase")
LR = Axis("optim.lr", Float(1e-4, 1e-2, log=True))


def problems(config: RunConfig, *axes: Axis, device: Device = "cpu") -> list[str]:
    """The lines of what `check` says; none where it says nothing."""
    try:
        check(Space(axes), config, device)
    except ConfigError as error:
        return str(error).split("\n")
    return []


def test_a_sound_space_passes() -> None:
    assert problems(
        SMALL,
        LR,
        Axis("batch.sequences", Choice((4, 8, 16))),
        Axis("optim.betas", Choice(([0.9, 0.95], [0.9, 0.999]))),
        Axis("schedule.kind", Choice(("cosine", "wsd"))),
        Axis("schedule.decay_fraction", Float(0.1, 0.5), When("schedule.kind", ("wsd",))),
        Axis("model.d_model", Int(64, 128, step=4)),
        Axis("precision", Choice(("fp32", "bf16"))),
    ) == []  # fmt: skip


def test_every_problem_has_its_line() -> None:
    found = problems(
        SMALL,
        Axis("optim.lrr", Float(1, 2)),
        Axis("batch_size", Choice((8, 16))),
        Axis("optim.lr", Float(0, 1, log=True)),
        Axis("optim.eps", Float(1e-6, 1e-9, log=True)),
        Axis("optim.weight_decay", Float(0.1, 0.1)),
        Axis("model.dropout", Choice(())),
        Axis("model.n_layers", Choice((0, 1, 2, 1001))),
        Axis("model.d_ff", Float(100, 200)),
        Axis("seed", Int(1, 2)),
        Axis("precision", Choice(("fp16", "fp32"))),
        Axis("schedule.min_lr_ratio", Float(0, 0.5), When("schedule.kind", ("cosine",))),
    )
    said = [
        "optim.lrr: unknown path; did you mean `optim.lr`?",
        "batch_size: unknown path; did you mean `batch.sequences`?",
        "optim.lr: a logarithmic range must start above 0",
        "optim.eps: low (1e-06) is above high (1e-09)",
        "optim.weight_decay: low and high are both 0.1",
        "model.dropout: nothing to choose from",
        "seed: must not be searched: the best seed is luck",
        "precision: fp16 cannot start here: a CPU has no fast fp16 arithmetic",
        "schedule.min_lr_ratio: exists only when schedule.kind is cosine, but schedule.kind is not searched",
        "model.n_layers: must be greater than 0, got 0",
        "model.n_layers: must be less than or equal to 1000, got 1001",
        "model.d_ff: must be a valid integer",
    ]
    for fragment in said:
        assert [fragment in line for line in found].count(True) == 1, (fragment, found)
    assert len(found) == len(said)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("seed", "--seeds"),
        ("workers", "not the result"),
        ("device", "not the result"),
        ("compile", "not the result"),
        ("model.activation_checkpointing", "not the result"),
        ("preset", "label"),
        ("init_from", "same weights"),
        ("tokenizer.kind", "loss per token"),
        ("tokenizer.vocab_size", "loss per token"),
        ("data.sources.0.corpus", "equal text"),
        ("data.validation.fraction", "equal text"),
        ("batch.tokens", "batch.sequences"),
        ("batch.micro_sequences", "batch.sequences"),
        ("budget.steps", "equal tokens"),
        ("budget.epochs", "equal tokens"),
        ("evaluation.max_tokens", "same scoring"),
        ("early_stopping.patience", "same scoring"),
        ("checkpoint.every_steps", "does not change the result"),
        ("logging.every_steps", "does not change the result"),
        ("samples.count", "does not change the result"),
        ("precision.compute", "search precision instead"),
        ("phases.prose.name", "label"),
        ("phases.prose.budget.steps", "phases.NAME.budget.share"),
        ("phases.0.data.sources.0.corpus", "equal text"),
        ("phases.code.model.activation_checkpointing", "not the result"),
        ("optim", "whole section"),
        ("phases", "whole section"),
        ("data.sources", "equal text"),
        ("schedule.kind", "search phases.prose.schedule.kind, phases.code.schedule.kind"),
        ("phases.3.optim.lr", "no such entry"),
        ("phases.prose.budget.shares", "equal tokens"),
    ],
)
def test_what_trials_must_share_is_refused(path: str, said: str) -> None:
    """On a configuration of two phases, each with its own schedule."""
    (line,) = problems(TWO, Axis(path, Choice((1, 2))))
    assert line.startswith(f"{path}: ")
    assert said in line


@pytest.mark.parametrize(
    "axis",
    [
        LR,
        Axis("phases.code.optim.lr", Float(1e-4, 1e-2, log=True)),
        Axis("phases.1.schedule.kind", Choice(("cosine", "wsd"))),
        Axis("phases.code.hand_over", Choice(("weights", "optimizer"))),
        Axis("phases.prose.budget.share", Float(0.2, 0.8)),
        Axis("phases.prose.model.dropout", Float(0, 0.3)),
        Axis("model.dropout", Float(0, 0.3)),
        Axis("model.shape", Choice(("1x180", "2x128"))),
    ],
)
def test_what_may_differ_passes(axis: Axis) -> None:
    """The negative control of the refusals above."""
    assert problems(TWO, axis) == []


def test_a_dropout_that_every_phase_overrides_changes_nothing() -> None:
    both = override(TWO, ["phases.prose.model.dropout=0.1", "phases.code.model.dropout=0.1"])
    (line,) = problems(both, Axis("model.dropout", Float(0, 0.3)))
    assert "every phase has its own" in line
    assert problems(override(TWO, ["phases.prose.model.dropout=0.1"]), Axis("model.dropout", Float(0, 0.3))) == []


def test_the_weights_of_a_mixture_may_be_searched() -> None:
    mixture = override(SMALL, ["data.sources=[{corpus: python-stdlib/prose, weight: 3}, {corpus: b, weight: 1}]"])
    axis = Axis("data.sources.1.weight", Float(0.25, 4, log=True))
    assert problems(mixture, axis) == []
    assert problems(SMALL, axis)  # has one source


def test_initial_weights_fix_the_architecture() -> None:
    config = override(SMALL, ["init_from=base"])
    assert "fix the model's architecture" in problems(config, Axis("model.n_layers", Choice((1, 2))))[0]
    assert problems(config, Axis("model.dropout", Float(0, 0.3))) == []
    assert problems(SMALL, Axis("model.n_layers", Choice((1, 2)))) == []


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([Axis("model.d_model", Int(126, 140))], "model.d_model (126) must be a multiple"),
        ([Axis("model.d_model", Int(124, 140))], "Not every value of 124 .. 140 is legal"),
        ([Axis("model.d_model", Int(124, 140, step=2))], "model.d_model (126) must be a multiple"),
        ([Axis("model.n_layers", Float(1, 3))], "Not every value of 1.0 .. 3.0 is legal"),
        ([Axis("batch.sequences", Choice((8, 0)))], "batch.sequences: must be greater than 0, got 0"),
        ([Axis("optim.name", Choice(("adamw", "lamb")))], "optim.name: must be 'adamw'"),
        ([Axis("optim.betas", Choice(([0.9, 0.95], [0.9, 1.5])))], "optim.betas.1: must be less than 1, got 1.5"),
        ([Axis("model.shape", Choice(("2x128", "3x105")))], "model.shape=3x105: model.d_model (105)"),
        ([Axis("model.shape", Choice(("2x128", "deep")))], "must be LAYERSxWIDTH, such as 2x128, got 'deep'"),
        ([Axis("precision", Float(1, 2))], "precision: must be a choice among fp32, bf16, fp16, int8, int4"),
        ([Axis("precision", Choice(("fp32", "fp8")))], "precision: there is no 'fp8'"),
        ([Axis("optim.betas", Choice(([0.9, 0.95], [0.9, 0.99]))), Axis("optim.betas.0", Float(0.8, 0.9))],
         "optim.betas.0: optim.betas sets the same value already"),
        ([Axis("model.shape", Choice(("2x128", "1x180"))), Axis("model.n_layers", Choice((1, 2)))],
         "model.n_layers: model.shape sets the same value already"),
        ([Axis("phases.prose.budget.share", Float(0.2, 0.8))], "a single phase"),
        ([Axis("a", Int(1, 2), When("b", (1,))), Axis("b", Int(1, 2))], "b must stand before it"),
        ([Axis("schedule.kind", Choice(("wsd", "step"))), Axis("optim.eps", Float(1e-9, 1e-6), When("schedule.kind",
          ("cosine",)))], "exists only when schedule.kind is cosine, which is not among its values"),
        ([Axis("schedule.kind", Choice(("wsd", "step"))), Axis("optim.eps", Float(1e-9, 1e-6), When("schedule.kind",
          ()))], "exists for no value"),
    ],
)  # fmt: skip
def test_a_value_that_is_illegal_here_is_refused(axes: list[Axis], said: str) -> None:
    assert sum(said in line for line in problems(SMALL, *axes)) == 1


def test_two_names_of_one_value_are_one_value() -> None:
    axes = [Axis(f"phases.{name}.optim.lr", Float(1e-4, 1e-2)) for name in ("code", "1")]
    assert problems(TWO, *axes) == ["phases.1.optim.lr: phases.code.optim.lr sets the same value already; "
                                    "search one of them."]  # fmt: skip


def test_the_micro_batch_must_divide_the_batch() -> None:
    genesis = preset("genesis/microscope")
    (line,) = problems(genesis, Axis("batch.sequences", Choice((4, 6, 8))))
    assert "the batch of 6 sequences must be a multiple of micro_sequences x workers (4 x 1 = 4)" in line


def test_the_last_phase_takes_the_rest() -> None:
    (line,) = problems(TWO, Axis("phases.code.budget.share", Float(0.2, 0.8)))
    assert "code is the last phase" in line


@pytest.mark.parametrize(
    ("name", "device", "changes", "said"),
    [
        ("fp16", "cpu", [], "about 30 times slower"),
        ("int8", "cuda", [], None),
        ("int8", "mps", [], "no kernels for MPS"),
        ("int8", "cuda", ["optim.name=rmsprop"], "no momentum in its 8-bit rmsprop"),
        ("int4", "cuda", [], "--init-from"),
        ("int4", "cuda", ["init_from=base"], None),
        ("fp16", "cuda", [], None),
        ("fp16", "mps", [], None),
        ("bf16", "cpu", [], None),
    ],
)
def test_a_precision_that_cannot_start_is_refused(name: str, device: Device, changes: list[str], said: Any) -> None:
    found = problems(override(SMALL, changes), Axis("precision", Choice(("fp32", name))), device=device)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_what_is_not_installed_counts_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space that another machine is to search is checked for everything else."""
    monkeypatch.setattr(precisions, "find_spec", lambda name: None)
    space = Space((Axis("precision", Choice(("bf16", "int8"))),))
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        check(space, SMALL, "cuda")
    check(space, SMALL, "cuda", packages=False)
    with pytest.raises(ConfigError, match="no kernels for MPS"):  # the control: what no package mends
        check(space, SMALL, "mps", packages=False)


def test_an_empty_space_is_refused() -> None:
    assert "empty" in problems(SMALL)[0]


def test_values_that_are_legal_only_together_pass() -> None:
    """3 and 6 heads do not fit the configured width of 128, but every width of this space."""
    heads, widths = Axis("model.n_heads", Choice((3, 6))), Axis("model.d_model", Choice((96, 192)))
    assert problems(SMALL, heads, widths) == []
    assert problems(SMALL, heads)
    assert problems(SMALL, heads, Axis("model.d_model", Choice((96, 128))))


width_axes = st.fixed_dictionaries(
    {
        "model.n_heads": st.lists(st.integers(1, 6), min_size=2, max_size=3, unique=True),
        "model.d_model": st.lists(st.integers(1, 12).map(lambda n: 4 * n), min_size=2, max_size=3, unique=True),
        "batch.sequences": st.lists(st.integers(1, 8), min_size=2, max_size=3, unique=True),
    }
)


@settings(max_examples=60, deadline=None)
@given(width_axes, st.sampled_from([1, 2]))
def test_check_passes_exactly_the_spaces_whose_every_point_is_legal(options: dict[str, list[int]], micro: int) -> None:
    config = override(SMALL, [f"batch.micro_sequences={micro}"])
    domains: dict[str, Domain] = {path: Choice(tuple(values)) for path, values in options.items()}
    space = Space(tuple(Axis(path, domain) for path, domain in domains.items()))

    def legal(point: dict[str, Any]) -> bool:
        try:
            return bool(trial_config(point, config))
        except ConfigError:
            return False

    assert (problems(config, *space.axes) == []) == all(legal(point) for point in space.grid(1))
