"""The commands of the `qwt-fx` program, one module each, and what they share."""
