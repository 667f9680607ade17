"""One family of errors: each says what was asked, what was found and what to do."""


class HFCompressError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(HFCompressError):
    """A recipe, rule or argument is wrong (exit code 2)."""

    exit_code = 2


class DataError(HFCompressError):
    """A dataset, split, column, label or line is not what was asked for (exit code 2)."""

    exit_code = 2


class TeacherError(HFCompressError):
    """Teacher and student cannot be compared: vocabularies, labels or image normalisations differ (exit code 2)."""

    exit_code = 2


class ResumeError(HFCompressError):
    """A run cannot be resumed from what is on disk (exit code 2)."""

    exit_code = 2


class FormatError(HFCompressError):
    """A compressed file is malformed, foreign, truncated or of another model (exit code 3)."""

    exit_code = 3


class IntegrityError(FormatError):
    """A compressed file's bytes are not those that were written: a digest differs (exit code 3)."""


class Interrupted(HFCompressError):
    """The run was stopped by the user; a checkpoint was committed first (exit code 130)."""

    exit_code = 130
