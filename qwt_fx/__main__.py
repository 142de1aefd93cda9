"""`python -m qwt_fx` is the `qwt-fx` program."""

from qwt_fx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
