"""The documentation: it names every public name, and the Python in pages and docstrings runs."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import gist
import gist_kernels
from gist.cli.main import _parser

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
PROMPT = r"^ *>>> "
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}


# Pages, and files of either package, with examples at a prompt.
WITH_EXAMPLES = [
    path
    for path in (
        *PAGES.values(),
        *sorted(ROOT.glob("gist/**/*.py")),
        *sorted(ROOT.glob("gist_kernels/**/*.py")),
    )
    if re.search(PROMPT, path.read_text(), flags=re.MULTILINE)
]


def snippets(path: Path) -> list[str]:
    """A page's Python, each snippet behind as many lines as stand above it on the page."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found, line = [], 0
    for above, language, code in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        line += above.count("\n") + 1
        if language == "python" and not NOT_RUN.search(above):
            found.append("\n" * line + code)
        line += code.count("\n")
    return found


def commands(path: Path) -> list[str]:
    """A page's indented lines that call gist. A line that ends with a backslash continues."""
    page = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r" \\\n +", " ", page)
    found = re.findall(r"^    (?:[A-Z_]+=\S+ )*gist (\S.*)$", page, flags=re.MULTILINE)
    return [re.split(r" (?:>|&&|\|) ", command)[0] for command in found if " ..." not in command]


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if commands(path)])
def test_the_command_line_takes_every_command_of_the_page(page):
    for command in commands(PAGES[page]):
        _parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("package", [gist_kernels, gist])
def test_every_public_name_is_documented(package):
    text = "\n".join(path.read_text() for path in PAGES.values())
    directives = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    missing = {f"{package.__name__}.{name}" for name in package.__all__} - directives
    assert not missing, f"add '::: NAME' to a page of docs/ for {sorted(missing)}"


@pytest.mark.parametrize("package", [gist_kernels, gist])
def test_no_page_documents_a_name_that_is_gone(package):
    text = "\n".join(path.read_text() for path in PAGES.values())
    named = re.findall(rf"^::: {package.__name__}\.(\w+)$", text, flags=re.MULTILINE)
    assert set(named) <= set(package.__all__)


def test_every_cache_is_listed():
    """A memoised function, or a module's own list or dict that calls fill."""
    kept = re.compile(r"lru_cache|functools.*\bcache\b|^_[a-z]\w*(: .*)? = (\[\]|\{\}|Weak)", re.M)
    sources = [p for name in ("gist", "gist_kernels") for p in (ROOT / name).rglob("*.py")]
    caching = {p for p in sources if kept.search(p.read_text(encoding="utf-8"))}
    assert len(caching) >= 5
    listed = PAGES["environment"].read_text(encoding="utf-8").partition("## What is cached")[2]
    missing = [p for p in caching if "/".join(p.parts[-2:]) not in listed]
    assert not missing, "list it in docs/environment.md: what its key is, and when it ends"


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if snippets(path)])
def test_python_on_the_page_runs(page, monkeypatch, tmp_path):
    create = timm.create_model

    def create_small(name, pretrained=False, **options):
        return create("vit_tiny_patch16_224" if pretrained else name, **{**SMALL, **options})

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))
    names = {"__name__": "__main__", "loader": DataLoader(data, batch_size=2)}
    for code in snippets(PAGES[page]):
        exec(compile(code, str(PAGES[page]), "exec", dont_inherit=True), names)


def examples(path: Path) -> list[doctest.DocTest]:
    """A file's examples at a prompt. A page's are one test; each docstring's run by themselves."""
    if path.suffix == ".md":
        text = re.sub(r"^```.*$", "", path.read_text(), flags=re.MULTILINE)
        return [doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)]
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    found = doctest.DocTestFinder(exclude_empty=True).find(module, globs={})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_print_what_the_docstring_says(path, capsys):
    tests = examples(path)
    prompts = re.findall(PROMPT, path.read_text(), flags=re.MULTILINE)
    assert sum(len(test.examples) for test in tests) == len(prompts), "some are in no docstring"
    runner = doctest.DocTestRunner(verbose=False)
    with gist_kernels.use_backend("auto"):  # the examples' own, whatever the environment says
        failures = sum(runner.run(test).failed for test in tests)
    assert failures == 0, capsys.readouterr().out


def test_readme_is_short():
    lines = PAGES["README"].read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 110
