"""The errors a person may see, by what they mean for the exit code."""


class UserError(ValueError):
    """Bad input: the message states the rule, the values and the way out. Exit code 2, no traceback."""


class ConfigError(UserError):
    """A run configuration that breaks a rule."""


class DataError(UserError):
    """A corpus, tokenizer or packed file that cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or made for another model."""


class TrainingFailed(RuntimeError):
    """Training cannot go on (non-finite loss under `raise`, repeated worker crashes). Exit code 3."""


class NonFinite(TrainingFailed):
    """The loss, a gradient or a score left the finite numbers."""


class Superseded(RuntimeError):
    """A newer claim owns this run: the caller must stop without writing anything."""
