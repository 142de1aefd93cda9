"""From flags to a model, calibration data and an evaluation set."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from qwt_fx.artifact.artifact_index import INDEX
from qwt_fx.batches import ranks
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.kept_batches import KeptBatches
from qwt_fx.batches.value_store import ValueStore
from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.clip import clip
from qwt_fx.clip.clip import ClipModel
from qwt_fx.clip.preprocessing import PreprocessOverrides, describe
from qwt_fx.commands.arguments import samples_of
from qwt_fx.commands.classification import Evaluation
from qwt_fx.commands.retrieval import Retrieval
from qwt_fx.commands.screen import Screen
from qwt_fx.data.classes import ClassPrompts, resolve
from qwt_fx.data.data import CalibrationData, load_calibration
from qwt_fx.data.imagefolder import open_validation
from qwt_fx.data.retrieval_data import RetrievalReader
from qwt_fx.data.sample_keys import SampleKeys
from qwt_fx.errors import ConfigError


def device_of(args: argparse.Namespace) -> str:
    """The device `--device` names. Raises `ConfigError` when it is unknown or absent."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.launched() and name.startswith("cuda"):
        return _own_gpu(name)
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {name!r}, wanted auto, cpu or cuda[:N]")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are here")
    return str(device)


def _own_gpu(name: str) -> str:
    """The GPU of one process among several: each needs its own."""
    number, count = ranks.local_rank(), torch.cuda.device_count()
    if name != "cuda" or number >= count:
        raise ConfigError(
            f"--device {name}: {count} CUDA devices are here, and process {number} of this machine "
            f"wants number {number} for itself; start as many processes as there are GPUs, with "
            "--device cuda, or use --device cpu"
        )
    return f"cuda:{number}"


_NEEDED = {
    "model": "--model NAME (of open_clip, or a config JSON)",
    "train_data": "--train-data SPEC (calibration shards, a folder or a csv file)",
    "output": "--output DIR",
}
_OF_A_MODEL = (
    "pretrained", "allow_torchscript", "image_mean", "image_std", "resize_mode", "interpolation",
)  # fmt: skip
_OF_IMAGENET = ("classnames", "templates", "class_map")


def check_flags(args: argparse.Namespace, *needed: str) -> None:
    """Raise `ConfigError` for flags that are missing, need others or contradict them.

    Before anything is loaded: a model takes a minute. `needed`: names of flags that the command needs.
    """
    if missing := [_NEEDED[name] for name in needed if getattr(args, name) is None]:
        listed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise ConfigError(f"{listed} {'are' if len(missing) > 1 else 'is'} needed")
    for names, owner in ((_OF_A_MODEL, "model"), (_OF_IMAGENET, "imagenet_val")):
        for name in names:
            if getattr(args, name, None) not in (None, False) and getattr(args, owner) is None:
                raise ConfigError(f"{_flag(name)} is given, but {_flag(owner)} is not")
    if hasattr(args, "iter"):
        samples_of(args)
    if hasattr(args, "image_key"):
        SampleKeys.parse(args.image_key, args.caption_key)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def load_model(args: argparse.Namespace) -> ClipModel:
    """The model of `--model` and `--pretrained`, its images prepared as the flags say."""
    check_flags(args, "model")
    if (Path(args.model) / INDEX).is_file():
        raise ConfigError(
            f"--model {args.model}: an artifact, whose towers are quantized already: give it as "
            "--artifact to eval, export, bench or inspect"
        )
    return clip.load(
        args.model,
        args.pretrained,
        device=device_of(args),
        precision=args.precision,
        allow_torchscript=args.allow_torchscript,
        preprocess=PreprocessOverrides(
            args.image_mean, args.image_std, args.resize_mode, args.interpolation
        ),
    )


def require_same_inputs(stored: ClipModel, floating: ClipModel) -> None:
    """Raise `ConfigError` where the model beside an artifact reads other images or texts than it does.

    Each would be given the other's inputs: an error of torch at best, figures of nothing at worst.
    """
    for what, there, here in (
        ("images", describe(stored.preprocess), describe(floating.preprocess)),
        ("texts", f"{stored.context_length} tokens", f"{floating.context_length} tokens"),
    ):
        if there != here:
            raise ConfigError(
                f"--model {floating.name} is not what the artifact was made of: it reads {what} of "
                f"{here}, the artifact (of {stored.name}) of {there}; give the same --model and flags"
            )


def show_preprocessing(model: ClipModel, screen: Screen) -> None:
    """One line on how images are prepared: a wrong mean is seen nowhere else."""
    screen.note(f"images of {model.name}: {describe(model.preprocess)}")


def deal_batches(
    args: argparse.Namespace,
    model: ClipModel,
    screen: Screen,
    extra_batches: int,
    prompts: ClassPrompts | None,
    store: ValueStore | None = None,
    *,
    captioned: bool = True,
) -> tuple[DistributedBatches, CalibrationData | None]:
    """As `load_batches`, read by the first rank: this rank's batches, and there all that was read."""
    among = ranks.current()
    data = None
    if among.first:
        data = load_batches(args, model, screen, extra_batches, prompts, store, captioned=captioned)
    sizes = among.from_first(lambda: [] if data is None else [len(b[0]) for b in data.batches])
    DistributedBatches([], sizes, among)  # enough for all, before they travel
    if data is not None and among.world == 1:
        return DistributedBatches(data.batches, sizes, among), data
    dealt = among.deal([] if data is None else data.batches)
    return DistributedBatches(
        dealt if store is None else KeptBatches.of(dealt, store), sizes, among
    ), data


def load_batches(
    args: argparse.Namespace,
    model: ClipModel,
    screen: Screen,
    extra_batches: int,
    prompts: ClassPrompts | None,
    store: ValueStore | None = None,
    *,
    captioned: bool = True,
) -> CalibrationData:
    """Calibration pairs; `extra_batches` more than asked for (an off-by-one of the original).

    `store` keeps them, by default memory. `captioned`: a sample without a caption is passed over.
    """
    check_flags(args, "train_data")
    keys = SampleKeys.parse(args.image_key, args.caption_key)
    with screen.phase("read calibration data") as update:
        data = load_calibration(
            args.train_data,
            dataset_type=args.dataset_type,
            transform=model.transform,
            tokenizer=model.tokenizer,
            samples=samples_of(args) + extra_batches * args.batch_size,
            batch_size=args.batch_size,
            seed=args.seed,
            workers=args.workers,
            class_prompts=prompts,
            progress=update,
            store=store,
            keys=keys if captioned else keys.without_captions(),
        )
    for note in data.notes:
        screen.note(note)
    return data


def open_evaluation(
    args: argparse.Namespace, model: ClipModel, screen: Screen, store: FeatureStore
) -> Evaluation | None:
    """The evaluation set of `--imagenet-val`; `None` when there is none."""
    if args.imagenet_val is None:
        return None
    folder = open_validation(
        args.imagenet_val, model.transform, getattr(args, "batch_size", 128), args.workers
    )
    prompts = resolve(
        folder.classes,
        None if args.classnames is None else Path(args.classnames),
        None if args.templates is None else Path(args.templates),
        args.class_map,
    )
    for note in prompts.notes:
        screen.note(note)
    tokens = model.tokenizer(prompts.sentences)
    return Evaluation(folder, prompts, tokens, model.device, store, ranks.current())


def open_retrieval(
    args: argparse.Namespace, model: ClipModel, store: FeatureStore
) -> Retrieval | None:
    """The image-caption pairs of `--retrieval-data`; `None` when there are none."""
    if args.retrieval_data is None:
        return None
    reader = RetrievalReader(
        args.retrieval_data,
        model.transform,
        model.tokenizer,
        getattr(args, "batch_size", 128),
        args.workers,
        SampleKeys.parse(args.image_key, args.caption_key),
    )
    return Retrieval(reader, model.device, store, ranks.current())
