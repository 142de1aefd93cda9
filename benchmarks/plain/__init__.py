"""A plain implementation of the published procedure, to measure against; not part of qwt-fx."""
