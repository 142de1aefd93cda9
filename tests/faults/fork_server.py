"""Runs `qwt-fx` many times without importing torch each time: one JSON request a line, one answer.

Each request is a real process of its own, forked before any work: its own signal handlers, files and
exit status; with "ranks": N it is N of them, started as torchrun does. A request names the command's
words and, optionally, at which call of which phase the process sends itself a signal, after how many
seconds it gets one, how large a file it may write, or when it loses the right to write.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore

import qwt_fx.artifact.artifact
import qwt_fx.commands.inputs
import qwt_fx.commands.quantize.pipeline
import qwt_fx.commands.quantize.quantize
import qwt_fx.commands.results
from qwt_fx import api, cli
from qwt_fx.calibrate.block_compensation import BlockCompensation
from qwt_fx.checkpoint.journal import StoredJournal
from qwt_fx.commands.classification import Evaluation
from qwt_fx.commands.quantize.tower_checkpoints import StoredTowerCheckpoint

LIMIT = 300.0
NOBODY = 65534

# Where a run is: (object, name of the function that begins the phase).
PHASES: dict[str, tuple[Any, str]] = {
    "load": (qwt_fx.commands.quantize.quantize, "load_model"),
    "read": (qwt_fx.commands.inputs, "load_calibration"),
    "capture": (qwt_fx.commands.quantize.pipeline, "capture"),
    "calibrate": (api, "calibrate"),
    "compensate": (BlockCompensation, "_block"),
    "convert": (api, "convert"),
    "step": (StoredJournal, "once"),
    "checkpoint": (StoredJournal, "commit"),
    "finish": (StoredTowerCheckpoint, "finish"),
    "forget": (StoredJournal, "forget"),
    "evaluate": (Evaluation, "quantized"),
    "save": (qwt_fx.artifact.artifact, "save_file"),
    "index": (qwt_fx.artifact.artifact, "index_document"),
    "report": (qwt_fx.commands.results, "write_text_atomic"),
    "commit": (os, "rename"),
}


def _hook(phase: str, call: int, act: Callable[[], None]) -> None:
    """`act` before the given call, counted from 0, of the phase's function."""
    owner, name = PHASES[phase]
    function = getattr(owner, name)
    calls = iter(range(1 << 30))

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, hooked)


def _child(request: dict[str, Any]) -> None:
    with open(request["stderr"], "ab") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    if "file_bytes" in request:
        limit = request["file_bytes"]
        _hook(*request["at"], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    elif request.get("lose_rights"):
        _hook(*request["at"], lambda: os.seteuid(NOBODY))
    elif "at" in request:
        _hook(*request["at"], lambda: os.kill(os.getpid(), request["signal"]))
    try:
        code = cli.main(request["words"])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = cli.EXIT_BUG
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    open(request["stderr"], "wb").close()
    if "ranks" in request:
        return _run_ranks(request)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(request)
    sent = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        elapsed = time.monotonic() - begun
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": elapsed, "sent": sent}
        if "after" in request and not sent and elapsed > request["after"]:
            os.kill(pid, request["signal"])
            sent = True
        if elapsed > LIMIT:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _run_ranks(request: dict[str, Any]) -> dict[str, Any]:
    """All ranks at once; "at" and "signal" are for the one that "rank" names."""
    # The store belongs to the launcher, and outlives the ranks.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"WORLD_SIZE": str(request["ranks"]), "MASTER_PORT": str(store.port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    running, codes = {}, [0] * request["ranks"]
    begun = time.monotonic()
    for rank in range(request["ranks"]):
        if (pid := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            _child({k: v for k, v in request.items() if k != "at" or rank == request["rank"]})
        running[pid] = rank
    del os.environ["WORLD_SIZE"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - begun > LIMIT:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"code": max(codes, key=abs), "codes": codes, "seconds": time.monotonic() - begun}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.__stdout__.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.__stdout__.flush()
