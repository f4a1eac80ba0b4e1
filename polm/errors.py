"""The error hierarchy.

`UserError` and its children are mistakes that the person at the keyboard can cure: the command line
prints their text without a traceback and exits with code 2. Everything else is a defect of ours.
Each message names what was found, what was expected and the cure.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a recipe, a file or a command; curable by the user."""


class RecipeError(UserError):
    """A recipe or an override that does not fit: names the file, the field, what was found, what is allowed."""


class DataError(UserError):
    """A data file that cannot be read or used: names the file and, where there is one, the line."""


class BadRecordError(DataError):
    """A record of a kind that happens in real data and cannot be learned from. `reason` is its word in the ledger,
    where such records are left out (`bad_records: drop`)."""

    reason = "bad"


class PromptsDifferError(BadRecordError):
    """A pair whose answers are to different prompts."""

    reason = "prompts_differ"


class MediaError(BadRecordError):
    """A record that refers to images, video or sound, which a text model cannot be trained on."""

    reason = "media"


class EmptyAnswerError(BadRecordError):
    """An answer of which the chat template leaves no token."""

    reason = "empty"


class EmptyStepError(BadRecordError):
    """An answer in steps of which one has no text."""

    reason = "empty_step"


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or that cannot do what the stage needs."""


class UnmarkableError(BadRecordError, ModelError):
    """A conversation in which the chat template does not let the assistant's tokens be told exactly, though it does in
    others."""

    reason = "unmarkable"


class StoreError(UserError):
    """A run directory or artifact that is in use, damaged, or does not match its manifest."""


class NonFiniteError(UserError):
    """A loss or a gradient that is not a finite number; the batch was saved beside the metrics."""
