"""The model card of a run: ``README.md`` in its folder, in the layout of Hugging Face's hub.

Every figure in it is one of ``results.json``. What no run knows, such as the licence of the images,
is left to be filled in. A card that was edited since is never overwritten.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml

from gist.backbones import hf_folder
from gist.runs.text import is_text

CARD_FILE = "README.md"
FILL_IN = "**to be filled in**"
CLASSES_SHOWN = 50
_MARK = "\n<!-- gist-card {}: gist train replaces this file only as long as nobody edits it -->\n"
_SNIPPET = """```python
from pathlib import Path
from gist.runs.predict import predict

for image, label, probability in predict(Path({folder!r}), [Path("photo.jpg")]):
    print(image, label, probability)
```"""
_MARKED = re.compile(_MARK.format("([0-9a-f]{16})") + r"\Z")


def card_file(
    directory: Path, results: Mapping[str, Any], classes: Sequence[str]
) -> dict[Path, bytes]:
    """The card to write into a run's folder, by its path.

    Args:
        directory: the run's.
        results: what ``results.json`` holds.
        classes: names, in the order of the logits.

    Returns:
        Empty for a run that is not complete, and where ``README.md`` is not ours: the user's own,
        or a card that was edited, of which a warning tells.
    """
    path = directory / CARD_FILE
    if not results["complete"] or not replaceable(path):
        return {}
    text = model_card(directory, results, classes)
    return {path: (text + _MARK.format(_digest(text))).encode()}


def replaceable(path: Path) -> bool:
    """Whether a file is missing, or a card as it was written."""
    if not path.exists():
        return True
    text = path.read_bytes().decode(errors="replace")
    marked = _MARKED.search(text)
    if marked is None:
        return False
    if marked[1] == _digest(text[: marked.start()]):
        return True
    warnings.warn(
        f"{path} was edited and stays as it is: its figures are those of an earlier training",
        stacklevel=4,
    )
    return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_card(directory: Path, results: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The card as Markdown below YAML; see :func:`card_file`."""
    config = results["config"]
    names = [method["name"] for method in _methods(config)]
    method = " and ".join(names) or "a classifier alone"
    token = " with a Gist token" if config["gist"]["gist"] else ""
    title = printable(directory.resolve().name)
    parts = [
        _front_matter(title, results, names),
        f"# {_escape(title)}",
        f"{code(_model(config))}, fine-tuned by {method}{token} to tell {len(classes):,} classes "
        f"apart. The backbone's weights stay outside this folder.",
        *_details(results, classes),
        *_use(directory, _item(results)),
        *_data(results),
        *_training(results),
        *_evaluation(results),
        *_limits(results, classes),
    ]
    return "\n\n".join(parts) + "\n"


# ---- front matter ------------------------------------------------------------------------------


def _front_matter(title: str, results: Mapping[str, Any], methods: Sequence[str]) -> str:
    config = results["config"]
    gist = ["gist"] if config["gist"]["gist"] else []
    task = f"{_item(results)}-classification"
    about: dict[str, Any] = {
        "library_name": "gist-kernels",
        "pipeline_tag": task,
        "tags": [task, "peft", *gist, *methods],
        "metrics": ["accuracy"],
    }
    base = base_model(config)
    if base is not None:
        about["base_model"] = base["hub_id"]
    if "test" in results:
        data = data_label(config)
        about["model-index"] = [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"name": data, "type": data, "split": "test"},
                        "metrics": [{"type": "accuracy", "value": results["test"]["accuracy"]}],
                    }
                ],
            }
        ]
    lines = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    licence = "# license: to be filled in, from the licences of the base model and of the data\n"
    return f"---\n{lines}{licence}---"


def base_model(config: Mapping[str, Any]) -> dict[str, str | None] | None:
    """The hub's id of a run's pretrained backbone, and the licence that timm states, if any.

    Returns:
        ``{"hub_id": ..., "licence": ...}``; None for other weights than timm's own.
    """
    of_folder = config["model"].startswith(hf_folder.PREFIX) or is_text(config)
    if of_folder or not config["pretrained"]:
        return None
    known = timm.models.get_pretrained_cfg(config["model"])
    if known is None or not known.hf_hub_id:
        return None
    return {"hub_id": known.hf_hub_id, "licence": known.license}


# ---- sections ----------------------------------------------------------------------------------


def _details(results: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    config, parameters = results["config"], results["parameters"]
    base = base_model(config)
    if base is not None and base["licence"]:
        licence = f"{code(base['licence'])}, as timm states it"
    else:
        licence = "none, the weights were drawn" if _drawn(config) else FILL_IN
    methods = [
        code(m["name"])
        + "".join(f", {key} {code(value)}" for key, value in m.items() if key != "name")
        for m in _methods(config)
    ]
    trained = ", ".join(f"{part} {parameters[part]:,}" for part in ("method", "token", "head"))
    tokens = config["gist"]["num_tokens"] if config["gist"]["gist"] else 0
    shown = ", ".join(map(code, classes[:CLASSES_SHOWN]))
    more = len(classes) - CLASSES_SHOWN
    return [
        "## Model details",
        _bullets(
            f"Backbone: {code(_model(config))}, weights: {_weights(config)}",
            f"Licence of the base model: {licence}",
            f"Licence of the data: {FILL_IN}",
            f"Method: {'; '.join(methods) or 'none, a new classifier alone'}",
            f"Gist tokens: {tokens}",
            f"Trained parameters: {trained}; frozen ones: {parameters['frozen']:,}",
            f"Classes: {shown}" + (f", and {more:,} more in `config.json`" if more > 0 else ""),
        ),
    ]


def _use(directory: Path, item: str) -> list[str]:
    folder = printable(str(directory))
    return [
        "## How to use",
        f"    gist predict {shlex.quote(folder)} {item.upper()}S > classes.csv"
        f"    # {item}, class, probability",
        *([_SNIPPET.format(folder=folder)] if item == "image" else []),
        "This needs `pip install 'gist-kernels[train]'` and the backbone's weights at the place "
        "named above. `gist export` writes a model that needs neither.",
    ]


def _data(results: Mapping[str, Any]) -> list[str]:
    config = results["config"]
    splits = [f"| {name} | {count:,} |" for name, count in results["splits"].items()]
    transforms = results.get("transforms")
    return [
        "## Data",
        f"{code(data_label(config))}, fingerprint {code(config['data_fingerprint'])}.",
        "\n".join([f"| split | {_item(results)}s |", "|---|---:|", *splits]),
        *([_preparation(transforms)] if transforms else []),
    ]


def _preparation(transforms: Mapping[str, Any]) -> str:
    evaluation = transforms["evaluation"]
    side = evaluation["input_size"][-1]
    squeezed = evaluation["crop_mode"] == "squash"
    trained = "augmented at random" if transforms["training"] else "prepared as in evaluation"
    return (
        f"Transforms: the preset {code(transforms['preset'])}. Training images are {trained}. In "
        f"evaluation an image is resized ({evaluation['interpolation']}), "
        f"{'squeezed to a square' if squeezed else 'its aspect ratio kept'}, and its centre of "
        f"{side} x {side} pixels is kept (crop percentage {evaluation['crop_pct']:.1%}). Levels "
        f"from 0 to 1 are normalised with mean {_numbers(evaluation['mean'])} and standard "
        f"deviation {_numbers(evaluation['std'])}."
    )


def _training(results: Mapping[str, Any]) -> list[str]:
    config = results["config"]
    settings = {**config["train"], **config["loss"]}
    for name in ("drop_path", "max_length", "dropout"):  # of images; of texts
        if name in config:
            settings[name] = config[name]
    for name in ("sampling", "class_weights"):
        settings[name] = config.get(name, "uniform")
    machine, versions = results["machine"], results["versions"]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    git = results["git"]
    changed = ", with local changes" if git and git["dirty"] else ""
    return [
        "## Training",
        "\n".join(
            ["| setting | value |", "|---|---|"]
            + [f"| {code(key)} | {code(value)} |" for key, value in settings.items()]
        ),
        _bullets(
            f"Time: {results['seconds']:,.0f} s with evaluation",
            f"Machine: {_escape(printable(machine['device']))}; processes: {machine['processes']}; "
            f"threads of each: {machine['threads']}",
            f"Versions: {installed}",
            f"Revision of the working folder's repository: {code(git['commit'])}{changed}"
            if git
            else "Revision: not trained inside a git repository",
        ),
    ]


def _evaluation(results: Mapping[str, Any]) -> list[str]:
    item = _item(results)
    held_out = []
    if "test" in results:
        count = results["splits"]["test"]
        held_out.append(("test", results["test"]["accuracy"], count, "used once, after training"))
    if results["val_accuracy"] is not None:
        count = results["splits"]["val"]
        held_out.append(("val", results["val_accuracy"], count, "chose the epoch: optimistic"))
    if not held_out:
        return ["## Evaluation", f"No {item} was held out: **the accuracy is not known.**"]
    rows = [
        f"| {split} | {accuracy:.2%} | {round(accuracy * count):,} of {count:,} | {role} |"
        for split, accuracy, count, role in held_out
    ]
    head = ["| split | accuracy | correct | role |", "|---|---:|---:|---|"]
    return ["## Evaluation", "\n".join(head + rows)]


def _limits(results: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    item = _item(results)
    untested = f"There was no test split: every accuracy above is of {item}s that chose the epoch."
    return [
        "## Limits",
        _bullets(
            *([] if "test" in results else [untested]),
            f"Every {item} gets one of the {len(classes):,} classes, whatever its content.",
            "The probability is the classifier's softmax. Nobody has calibrated it.",
            f"All {item}s come from one source. The accuracy on those of another is not known.",
            "One run with one seed. Another seed gives another accuracy.",
            "No test of accuracy by group, of bias or of robustness was made.",
        ),
    ]


# ---- words -------------------------------------------------------------------------------------


def _item(results: Mapping[str, Any]) -> str:
    return "text" if is_text(results["config"]) else "image"


def data_label(config: Mapping[str, Any]) -> str:
    """The data's name without the folders above it, which may be private."""
    return printable(Path(config["data"]).name or config["data"])


def printable(text: str) -> str:
    """Text of one line; a byte that is not UTF-8, or a control character, is escaped."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def code(value: Any) -> str:
    """Markdown that shows a value as it is."""
    text = printable(str(value)) or " "
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _escape(text: str) -> str:
    """Markdown of plain text."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", text)


def _bullets(*lines: str) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _methods(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    described = config["gist"]["method"]
    return described if isinstance(described, list) else [described] if described else []


def _model(config: Mapping[str, Any]) -> str:
    """A model's name; of a folder, the folder's name only."""
    name: str = config["model"]
    folder = name.removeprefix(hf_folder.PREFIX)
    is_folder = folder != name or is_text(config)
    return Path(folder).resolve().name if is_folder else name


def _drawn(config: Mapping[str, Any]) -> bool:
    return not config["pretrained"] and config.get("weights") is None


def _weights(config: Mapping[str, Any]) -> str:
    if config.get("weights") is not None:
        return code(Path(config["weights"]).name)
    base = base_model(config)
    if base is not None:
        return f"{code(base['hub_id'])}"
    return "drawn at random" if _drawn(config) else "the folder's own"
