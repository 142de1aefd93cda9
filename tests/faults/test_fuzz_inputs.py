"""Arguments, config files and name files of any content: exit code 0 or 2, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_clip import CONFIG

from qwt_fx.cli import main
from qwt_fx.clip import clip
from qwt_fx.data import classes
from qwt_fx.errors import QwtError

# Values that parsers and file systems trip over. No `pipe:`, which runs what it is given.
VALUES = [
    "", " ", "-", "--", "0", "1", "-1", "2", "8", "9", "1e3", "0x10", "1_0", "٣", "99999999999999999999",
    "nan", "inf", "true", "none", "auto", "cpu", "cuda", "cuda:99", "cuda:-1", "cuda:x", "meta", "fp16",
    "ViT-B-32", "ViT-B/32", "RN50", "local-dir:.", "local-dir:", "a.json", ".", "..", "/", "/dev/null",
    "/proc/self/mem", "/nowhere/at/all", "~", "a\0b", "a\nb", "é", "\udcff", "x" * 5000, "{0..3}.tar",
    "{a,b}", "{", "}", "{0..99999999999}", "{9..0}.tar", "a::b", "::", "${HOME}", "*.tar", "*=w8a8", "=",
    "*=skip", "[=w4a4", "a=b=c", "%s%n", "{}", "qwt", "lowrank:2", "lowrank:0", "lowrank:x", "int8",
    "both", "text", "image_only", "fp32_eval", "best", "repq-vit", "original", "log2", "webdataset",
    "imagefolder", "csv", "eager", "x86", "http:", "ftp://", "file:", "file:///x.tar",
]  # fmt: skip
FLAGS = """--model --pretrained --device --precision --train-data --dataset-type --calib-samples --iter
--batch-size --workers --seed --choice --towers --wq_params --w-bits --aq_params --a-bits --recipe
--compat --compensation --qwerty --qwt --attention --override --config --imagenet-val --classnames
--templates --output --force --max-drop --quiet --threads --artifact --backend --report --help --version
--allow-torchscript --unknown -h -x --calib --w""".split()

TEXT = st.text(max_size=20).filter(lambda s: not s.lstrip().startswith(("pipe:", "hf")))
VALUE = st.sampled_from(VALUES) | TEXT
WORD = st.sampled_from(FLAGS) | VALUE | st.builds("{}={}".format, st.sampled_from(FLAGS), VALUE)
# `demo` would work without arguments, for minutes.
LINES = st.builds(
    lambda command, words: [command, *words],
    st.sampled_from(["quantize", "eval", "inspect", "export", "bench", "nothing", ""]),
    st.lists(WORD, max_size=8),
) | st.builds(lambda words: ["demo", "--variant", "x", *words], st.lists(WORD, max_size=4))

QUIET = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FAST, SLOW = settings(QUIET, max_examples=150), settings(QUIET, max_examples=1500)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty current folder, and what the command line sets put back."""
    monkeypatch.chdir(tmp_path)
    threads, level = torch.get_num_threads(), logging.getLogger("qwt_fx").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("qwt_fx").setLevel(level)


def exit_code(words: list[str]) -> tuple[int, str]:
    """The program's exit code and what it wrote to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0
    return code, errors.getvalue()


def check_line(words: list[str]) -> None:
    code, errors = exit_code(words)
    assert code in (0, 2), (words, errors)
    assert "Traceback" not in errors
    assert code == 0 or errors.strip(), words


@FAST
@given(LINES)
def test_arguments(words: list[str]) -> None:
    check_line(words)


@pytest.mark.slow
@SLOW
@given(LINES)
def test_arguments_1500(words: list[str]) -> None:
    check_line(words)


# -- config files ------------------------------------------------------------------------------

KEYS = st.sampled_from([f.lstrip("-") for f in FLAGS]) | st.text(max_size=8)
SCALARS = (
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | VALUE.filter(lambda s: s.isprintable())
)
TREES = st.recursive(
    SCALARS, lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS, t, max_size=3), max_leaves=5
)


def toml(value: Any) -> str:
    """A value in TOML's inline syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return repr(value)


def documents() -> st.SearchStrategy[bytes]:
    """Well-formed TOML of any shape, damaged TOML, and any bytes."""
    good = st.dictionaries(KEYS, TREES, max_size=4).map(
        lambda d: "\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in d.items())
    )
    encoded = good.map(lambda s: s.encode("utf-8", "surrogatepass"))
    cut = st.builds(lambda data, n: data[: n % (len(data) + 1)], encoded, st.integers(0, 500))
    return encoded | cut | st.binary(max_size=60) | st.just(b"a=" + b"[" * 100_000)


def check_config(data: bytes) -> None:
    Path("c.toml").write_bytes(data)
    code, errors = exit_code(["quantize", "--config", "c.toml"])
    # There is no model: nothing can succeed, except that a file asks for help.
    assert code == 2, (data, errors)
    assert "Traceback" not in errors and errors.strip()


@FAST
@given(documents())
def test_config_files(data: bytes) -> None:
    check_config(data)


@pytest.mark.slow
@SLOW
@given(documents())
def test_config_files_1500(data: bytes) -> None:
    check_config(data)


# -- class names and templates -----------------------------------------------------------------

NAMES = st.binary(max_size=80) | st.lists(st.text(max_size=12), max_size=5).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)


def check_names(names: bytes, templates: bytes) -> None:
    Path("names.txt").write_bytes(names)
    Path("templates.txt").write_bytes(templates)
    try:
        prompts = classes.resolve(["a", "b"], "names.txt", "templates.txt")
    except QwtError as error:
        assert "names.txt" in str(error) or "templates.txt" in str(error)
        return
    assert len(prompts.names) == 2 and prompts.templates
    for k in range(2):
        for prompt in prompts.prompts(k):
            assert prompts.names[k] in prompt


@settings(FAST, max_examples=200)
@given(NAMES, NAMES.map(lambda b: b"a {}\n" + b) | NAMES)
def test_class_names(names: bytes, templates: bytes) -> None:
    check_names(names, templates)


@pytest.mark.slow
@SLOW
@given(NAMES, NAMES.map(lambda b: b"a {}\n" + b) | NAMES)
def test_class_names_1500(names: bytes, templates: bytes) -> None:
    check_names(names, templates)


# -- model configurations ----------------------------------------------------------------------

ODD: list[Any] = [None, "x", "", [], {}, [1], {"a": 1}, -1, 0, 1.5, True, "gelu", [16, 24, 8]]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_model_configurations(tmp_path: Path, seed: int) -> None:
    """One value of a model's configuration is something else: a model, or an error of ours."""
    choose = random.Random(seed)
    for _ in range(15 if seed == 0 else 150):
        config = json.loads(json.dumps(CONFIG))
        part = choose.choice([config, config["vision_cfg"], config["text_cfg"]])
        part[choose.choice([*part, "extra"])] = value = choose.choice(ODD)
        (tmp_path / "m.json").write_text(json.dumps(config))
        with contextlib.suppress(QwtError):
            assert clip.load(str(tmp_path / "m.json"), allow_random=True) is not None, value
