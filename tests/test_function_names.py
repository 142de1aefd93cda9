"""Functions of the package keep their names, though rooms of the same names exist as folders."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import types

import qwt_fx
from qwt_fx import api


def test_capture_and_calibrate_stay_functions_once_every_module_is_imported() -> None:
    """Python sets a package's attribute when a folder in it is imported for the first time.

    So `qwt_fx.capture` would be the room if nothing had imported that before the function got the name.
    """
    names = [m.name for m in pkgutil.walk_packages(qwt_fx.__path__, "qwt_fx.")]
    assert len(names) > 100
    for name in names:
        if not name.endswith(".__main__"):
            try:
                importlib.import_module(name)
            except ImportError as error:  # an optional dependency that is not installed
                assert not (error.name or "qwt_fx").startswith("qwt_fx"), error
    for name in ("capture", "calibrate"):
        assert isinstance(sys.modules[f"qwt_fx.{name}"], types.ModuleType)
        function = getattr(qwt_fx, name)
        assert isinstance(function, types.FunctionType), f"qwt_fx.{name} is {function}"
        assert function is getattr(api, name)
