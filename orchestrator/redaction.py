"""What may leave this machine: text and mappings with every secret we can recognise taken out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

REDACTED = "[redacted]"

# Whole words of a key: `hub_token` and `api-key` are secret, `prompt_tokens` and `tokenizer.kind` are not.
_SECRET_WORDS = frozenset(
    {"password", "passwd", "pwd", "passphrase", "secret", "token", "apikey", "credential", "credentials", "cookie"}
)
_SECRET_PAIRS = re.compile(
    r"(api|access|private|secret|signing|encryption|auth)[-_. ]?key|auth[-_. ]?token", re.IGNORECASE
)

_SECRET_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"  # GitHub, GitLab
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"  # AWS, Google
    r"|\bsk-[\w-]{16,}|\bxox[abposr]-[\w-]{10,}|\bdapi[0-9a-f]{32}"  # OpenAI and alike, Slack, Databricks
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
_SECRET_CONTEXTS = (
    (re.compile(r"://[^/\s@]+@"), f"://{REDACTED}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w+/=.~-]{8,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (
        re.compile(r"\b([\w-]*(?:token|secret|password|passwd|api_?key|signature|sig))=[^&\s'\"]+", re.IGNORECASE),
        rf"\1={REDACTED}",
    ),
)


def is_secret_name(key: str) -> bool:
    """Whether a thing of this name is kept to ourselves (`HF_TOKEN`, `db.password`), by whole words."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower())
    return not _SECRET_WORDS.isdisjoint(words) or _SECRET_PAIRS.search(key) is not None


def redact(text: str) -> str:
    """`text` without known token shapes, passwords in URLs and the values of secret environment variables."""
    return _without(text, _environment_secrets())


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _SECRET_VALUES.sub(REDACTED, text)
    for pattern, replacement in _SECRET_CONTEXTS:
        text = pattern.sub(replacement, text)
    return text


def redact_mapping(values: Mapping[str, str]) -> dict[str, str]:
    """The same keys; the value of a secret name is gone, every other value is `redact`ed."""
    secrets = _environment_secrets()
    return {
        key: REDACTED if value and is_secret_name(key) else _without(value, secrets) for key, value in values.items()
    }


def _environment_secrets() -> list[str]:
    # Shorter values ("1", "true", "yes") would take out half of every sentence.
    found = {value for name, value in os.environ.items() if len(value) >= 8 and is_secret_name(name)}
    return sorted((value for value in found if not os.path.exists(value)), key=len, reverse=True)
