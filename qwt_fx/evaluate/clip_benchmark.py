"""Results in the format of CLIP_benchmark, so that its tools read them beside their own.

One JSON object a file: dataset, model, pretrained, task, metrics, language, as its `eval` command
writes and its `build` command reads. A quantized model keeps its name; what was done to it is told
in `pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.errors import ConfigError
from qwt_fx.evaluate.retrieval import RECALLS

ZERO_SHOT, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"
_METRICS = {ZERO_SHOT: ("acc1", "acc5", "mean_per_class_recall"), RETRIEVAL: RECALLS}
FIELDS = ("dataset", "model", "pretrained", "task", "language")


def documents(report: JsonObject, datasets: Mapping[str, str]) -> Iterator[JsonObject]:
    """One object for each model and task that a report.json has figures of.

    `datasets` names the data of each task.
    """
    for side in ("fp32", "quantized"):
        measured = report["metrics"][side]
        for task, names in _METRICS.items():
            if measured[names[0]] is None:
                continue
            yield {
                "dataset": datasets[task],
                "model": report["model"],
                "pretrained": pretrained_name(report, quantized=side == "quantized"),
                "task": task,
                "metrics": {name: measured[name] for name in names},
                "language": "en",
            }


def pretrained_name(report: JsonObject, *, quantized: bool) -> str:
    """The weights' tag or file name; of a quantized model with bits, recipe and towers."""
    name = Path(report["pretrained"] or "").name
    if not quantized:
        return name
    parts = [f"w{report['w_bits']}a{report['a_bits']}", report["recipe"]]
    parts += [] if report["compensation"] == "none" else [report["compensation"]]
    parts += ["dynamic"] if report["activations"] == "dynamic" else []
    parts += [] if report["attention"] == "none" else [f"attention-{report['attention']}"]
    parts += [] if len(report["towers"]) == 2 else [f"{'-'.join(report['towers'])}-only"]
    return "-".join([name, "qwt-fx", *parts]).lstrip("-")


def write_documents(template: str, report: JsonObject, datasets: Mapping[str, str]) -> None:
    """Write each of `documents` to its own file.

    Args:
        template: a file name, in which {dataset}, {model}, {pretrained}, {task} and {language}
            stand for the object's; slashes in them become underscores.
        report, datasets: as `documents`.

    Raises:
        ConfigError: an unknown name in braces, or two objects for one file.
        OutputError: a file cannot be written.
    """
    by_path: dict[str, JsonObject] = {}
    for document in documents(report, datasets):
        path = _filled(template, document)
        if path in by_path:
            raise ConfigError(
                f"--clip-benchmark-json {template}: several results would be written to {path}; "
                "put {task} and {pretrained} into the name"
            )
        by_path[path] = document
    for path, document in by_path.items():
        write_text_atomic(Path(path), json.dumps(document, allow_nan=False) + "\n")


def check_template(template: str) -> None:
    """Raise `ConfigError` for a template with unknown names in braces."""
    _filled(template, dict.fromkeys(FIELDS, ""))


def _filled(template: str, document: JsonObject) -> str:
    try:
        return template.format(**{name: document[name].replace("/", "_") for name in FIELDS})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--clip-benchmark-json {template}: wanted braces around {', '.join(FIELDS)} only "
            f"({type(error).__name__}: {error})"
        ) from None
