"""What every test can rely on: no network, few threads, and GPU tests only where a GPU is."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

# Several processes take whole files, these first: what takes long must not begin last.
LONG = (
    "test_resume.py", "test_cli.py", "test_zoo.py", "test_interruptions.py", "test_distributed.py",
    "test_examples.py", "test_random_graphs.py",
)  # fmt: skip
_LOOPBACK = ("127.", "::1", "localhost")
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


class NetworkForbidden(ConnectionError):
    """A test reached for the network."""


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6):
        _refuse_remote(address[0])
    _connect(self, address)


def _resolve_locally(host: Any, *args: Any, **kwargs: Any) -> Any:
    if host is not None:
        _refuse_remote(host)
    return _getaddrinfo(host, *args, **kwargs)


def _refuse_remote(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if not name.startswith(_LOOPBACK):
        raise NetworkForbidden(f"no test needs the network, but this one asked for {name}")


def pytest_configure() -> None:
    # For good, not by a fixture: imports and session fixtures must not reach out either.
    socket.socket.connect = _connect_locally  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = _resolve_locally
    # As many as the smallest machine that runs the tests has; more only adds noise to small sizes.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(min(2, torch.get_num_threads()) if alone else 1)  # OMP_NUM_THREADS: fewer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def _seed_module() -> None:
    _seed()


@pytest.fixture(autouse=True)
def _seed_test(_seed_module: None) -> None:
    """A test draws the same numbers alone, in its file and beside any others."""
    _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
