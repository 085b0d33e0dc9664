"""The tables of benchmarks say what the JSON files say."""

from __future__ import annotations

import json

import pytest

from bench import tables


@pytest.mark.parametrize("number", range(len(tables.tables())))
def test_every_table_is_what_its_json_file_says(number):
    table = tables.tables()[number]
    page = (tables.ROOT / table.page).read_text()
    assert tables.replaced(page, table) == page, "run: make tables"


def test_every_figure_of_a_page_comes_from_a_file(tmp_path, monkeypatch):
    """Another time in a file changes the page, and nothing but the tables of that file."""
    source = json.loads((tables.RESULTS / tables.ZEN3 / "step.json").read_text())
    released = source["cases"][0]["results"]["released"]
    released.update(median=1.2344, times_ours=1.5, peak_bytes=250e6)
    (tmp_path / tables.ZEN3).mkdir()
    (tmp_path / tables.ZEN3 / "step.json").write_text(json.dumps(source))
    table = tables.tables()[3]
    page = (tables.ROOT / table.page).read_text()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables._cases.cache_clear()
    column = tables.times_and_memory(f"{tables.ZEN3}/step", 0)
    changed = tables.by_contender(table.page, table.head, {"released": "released"}, column)
    after = tables.replaced(page, changed).split("\n")
    tables._cases.cache_clear()
    assert "| released | 1,234 ms (1.50x) | 250 MB |" in after
    assert len(after) == len(page.split("\n")) - 5


def test_a_page_without_the_table_is_an_error():
    table = tables.Table("docs/results.md", ["a", "b"], [["1", "2"]])
    assert tables.replaced("x\n| a | b |\n|-|\n| 0 |\n\ny", table) == (
        "x\n| a | b |\n|---|---:|\n| 1 | 2 |\n\ny"
    )
    for page in ("x", "| a | b |\n\n| a | b |"):
        with pytest.raises(ValueError, match=r"docs/results.md has [02] tables"):
            tables.replaced(page, table)


def test_check_fails_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("| a | b |\n|---|---:|\n| 1 | 3 |\n")
    table = tables.Table("page.md", ["a", "b"], [["1", "2"]])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "tables", lambda: [table])
    with pytest.raises(SystemExit, match="python -m bench.tables"):
        tables.main(["--check"])
    assert "differs page.md: | a | b |" in capsys.readouterr().out
    assert "3" in (tmp_path / "page.md").read_text()
    tables.main([])
    assert (tmp_path / "page.md").read_text() == "| a | b |\n|---|---:|\n| 1 | 2 |\n"
    tables.main(["--check"])


@pytest.mark.parametrize(
    ("value", "text"), [(0.2463, "0.246"), (4.525, "4.5"), (99.96, "100"), (2722.4, "2,722")]
)
def test_three_digits(value, text):
    assert tables.figure(value) == text
