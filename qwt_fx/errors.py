"""Errors raised on purpose: one base class, so that callers and the CLI can tell them from bugs.

A message says what went wrong, where, the value got, the value wanted, and the remedy.
"""

from __future__ import annotations

import re


class QwtError(Exception):
    """Base of every error that qwt-fx raises on purpose; the CLI exits with code 2."""


class ConfigError(QwtError):
    """A configuration value is out of range, unknown or contradicts another."""


class CaptureError(QwtError):
    """A model cannot be captured into a canonical ATen graph; the message names the node."""


class DataError(QwtError):
    """Calibration or evaluation data is missing, damaged or does not fit the model."""


class ModelError(QwtError):
    """A model name, checkpoint or architecture is unknown, missing or does not match."""


class ArtifactError(QwtError):
    """An artifact is damaged, incomplete, from the future, or must not be written."""


class OutputError(QwtError):
    """An output folder or file cannot be written or must not be replaced."""


class MissingExtraError(QwtError):
    """An optional dependency is not installed; the message names the extra."""


class CheckFailed(QwtError):
    """A requested check ran and failed (`--max-drop`, `--verify`); the CLI exits with code 3."""


class PassError(QwtError):
    """A pass could not run."""


class PreconditionError(PassError):
    """The graph given to a pass lacks what the pass requires."""


class PostconditionError(PassError):
    """A pass left a graph that breaks its own promise: a bug in the pass."""


class NotCalibratedError(PreconditionError):
    """A quantizer has no scale yet: observe or calibrate first."""


class RankError(QwtError):
    """Another process of a distributed run ended or does not answer."""


def first_line(error: BaseException) -> str:
    """An error of another library, for use inside a message of one line."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
