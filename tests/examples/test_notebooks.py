"""The notebooks of examples/: they run from top to bottom, and hold nothing of where they ran."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def run(path: Path) -> dict[str, object]:
    """Execute the code cells in one namespace, as a notebook does. Magics are no Python."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(cells(path, "code"), 1):
        code = compile(source, f"{path.name}, code cell {number}", "exec", dont_inherit=True)
        exec(code, names)
    return names


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """A folder for what they write, and no window for what they draw."""
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
    matplotlib.use(backend)


def test_both_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["finetune", "kernels"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_output_and_no_path(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work)\b", "".join(cell["source"]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_to_files(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", "\n".join(cells(path, "markdown")))
    assert links
    assert [link for link in links if not (FOLDER / link).is_file()] == []


def test_kernels_runs(capsys):
    run(FOLDER / "kernels.ipynb")
    printed = capsys.readouterr().out
    assert "with the same gradients" in printed
    assert re.search(r"the formula takes [\d.]+ times as long", printed)
    assert "plain formula: nan" in printed


@pytest.mark.slow  # half a minute
def test_finetune_runs(capsys, tmp_path):
    names = run(FOLDER / "finetune.ipynb")
    assert names["results"]["test"]["accuracy"] > 0.5  # 0.1 by chance
    assert "logits differ by at most" in capsys.readouterr().out
    assert (tmp_path / "notebook" / "run" / "report.html").is_file()
