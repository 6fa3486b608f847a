"""What a person must mend before a job can be sent or followed."""

from __future__ import annotations


class SubmissionError(RuntimeError):
    """One message: the rule, the values, the way out."""
