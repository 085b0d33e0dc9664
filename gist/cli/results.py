"""Commands on finished runs, ``gist merge`` and ``gist predict``, and on the kernels."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import gist_kernels
from gist.backbones import hf_folder
from gist.backbones.create import input_size
from gist.cli.common import add_command, add_device_options, console, warn_passed_over
from gist.cli.text import predict_and_print
from gist.data import load_data, prepare
from gist.files import CsvTable, write_atomically
from gist.model.merge import merge
from gist.runs import summary
from gist.runs.predict import find, predict
from gist.runs.run import is_text_run, load_run, read_results, transforms_of
from gist.training.evaluation import evaluate


def register(commands: Any) -> None:
    """Add the commands to the parser of ``gist``."""
    merged = add_command(
        commands, "merge", _merge, "fold a run's method into a plain model, and test that"
    )
    merged.add_argument("run", type=Path, help="the folder of a finished run")
    merged.add_argument("--drop-token", action="store_true",
                        help="leave the Gist token out, which is not exact")  # fmt: skip
    merged.add_argument("--data", help="what to test on; default: the run's")
    merged.add_argument(
        "--out", type=Path, help="default: merged.safetensors, or merged, in the folder"
    )
    add_device_options(merged)

    predicted = add_command(
        commands, "predict", _predict, "the classes a run gives to images or texts, printed as CSV"
    )
    predicted.add_argument("run", type=Path, help="the folder of a finished run")
    predicted.add_argument(
        "inputs",
        nargs="+",
        help="image files, or folders of them; of a run on texts: .csv, .tsv and .jsonl files with "
        "a column text, other files with a text a line, or - for the lines of standard input",
    )
    add_device_options(predicted)

    add_command(commands, "backends", _backends, "what can run the kernels here, and why not")
    # All options go to the benchmarks: no prefix makes an option here.
    about = "time the kernels against their peers"
    bench = commands.add_parser("bench", help=about, prefix_chars="\0", add_help=False)
    bench.set_defaults(command=_bench)
    bench.add_argument("arguments", nargs="*")


def _bench(arguments: argparse.Namespace) -> None:
    """Run the repository's benchmarks in a process of their own."""
    repository = Path(__file__).parents[2]
    if not (repository / "bench" / "__main__.py").exists():
        raise FileNotFoundError(
            "the benchmarks are in the repository, not in the installed package: clone it, run "
            "pip install -e '.[bench]' there, and this command again"
        )
    command = [sys.executable, "-m", "bench", *arguments.arguments]
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)  # as a shell says which signal ended it


def _backends(arguments: argparse.Namespace) -> None:
    for name, info in gist_kernels.backends().items():
        state = "available" if info.available else "not available"
        console.print(f"{name}: {state}. {info.detail}", highlight=False)
        if info.available:
            console.print(f"    serves: {', '.join(info.operations) or 'nothing yet'}")


def _merge(arguments: argparse.Namespace) -> None:
    """Fold a finished run's method into a plain model, and test that model."""
    if is_text_run(arguments.run):
        raise ValueError(
            "gist merge takes runs on images; merge texts' in Python: "
            "gist.merge(gist.runs.run.load_run(folder))"
        )
    model = load_run(arguments.run)
    merged = merge(model, drop_token=arguments.drop_token)
    results = read_results(arguments.run)
    assert results is not None
    _write_merged(merged, results["config"]["model"], arguments)
    # Unchecked: the test reads the images that it needs, and names one that it can't read.
    data = load_data(arguments.data or results["config"]["data"], check=False)
    warn_passed_over(data.passed_over)
    split, which = (data.test, "test") if data.test is not None else (data.val, "validation")
    assert split is not None
    images = prepare(split, transforms_of(arguments.run))
    models = (model, _Logits(merged))
    before, after = (evaluate(each.to(arguments.device), images) for each in models)
    console.print(
        f"{len(images):,} {which} images: {before.accuracy:.2%} as trained, {after.accuracy:.2%} "
        f"merged{' without the Gist token' if arguments.drop_token else ''}",
        highlight=False,
    )


class _Logits(nn.Module):
    """A model's logits, which transformers' models return within an output of their own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.model(images)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits


def _write_merged(merged: Any, name: str, arguments: argparse.Namespace) -> None:
    """Write the plain model, and say how to load it."""
    if name.startswith(hf_folder.PREFIX):
        out = arguments.out or arguments.run / "merged"
        hf_folder.save(merged, out, like=Path(name.removeprefix(hf_folder.PREFIX)))
        how = f"transformers.AutoModelForImageClassification.from_pretrained({str(out)!r})"
    else:
        out = arguments.out or arguments.run / "merged.safetensors"
        write_atomically(out, safetensors.torch.save(merged.state_dict()))
        options = {"num_classes": merged.num_classes, "img_size": input_size(merged)}
        if hasattr(merged, "num_reg_tokens"):  # a Gist token may have become one of them
            options["reg_tokens"] = merged.num_reg_tokens
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        how = f"timm.create_model({name!r}, {listed})"
    console.print(f"{out}: weights of {how}", soft_wrap=True)
    prepared = transforms_of(arguments.run).evaluation
    listed = ", ".join(f"{key}={value!r}" for key, value in prepared.items())
    console.print(f"It takes images as timm.data.create_transform({listed})", soft_wrap=True)


def _predict(arguments: argparse.Namespace) -> None:
    """Print a finished run's predictions as CSV."""
    if is_text_run(arguments.run):
        predict_and_print(arguments)
        return
    found = find([Path(path) for path in arguments.inputs])
    warn_passed_over(found.passed_over)
    predictions = predict(arguments.run, found, device=arguments.device)
    first = next(predictions)  # raises before the table starts
    table = CsvTable(sys.stdout)
    table.row("image", "class", "probability")
    for image, label, probability in chain((first,), predictions):
        table.row(str(image), label, f"{probability:.4f}")


def show(results: dict[str, Any], directory: Path, title: str) -> None:
    """Print the table of some runs and draw their curves into ``directory``."""
    if console.quiet:  # another process shows them
        return
    console.print(summary.table(results, title))
    picture = directory / "curves.png"
    try:
        summary.plot(results, picture, title)
    except ImportError as error:
        console.print(str(error), style="yellow")
    for name, result in results.items():
        fit = result["fit"]
        if fit.get("stopped_early"):  # an earlier version's runs have no such key
            schedule, ended = result["config"]["train"], len(fit["history"])
            of = schedule["stop_after"] or schedule["epochs"]
            console.print(
                f"{name}: stopped at epoch {ended} of {of}; validation accuracy was not above that "
                f"of epoch {ended - schedule['patience']} since",
                highlight=False,
                soft_wrap=True,
            )
        if result["reused"]:
            console.print(f"{name}: finished earlier, --fresh trains it again", style="dim")
    console.print(f"Results, weights and curves: {directory}", highlight=False, soft_wrap=True)
