"""The version of qwt-fx."""

__version__ = "0.1.0"
