"""A hook of MkDocs: the notebooks of examples/ as pages that the search finds, and as files."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def page(notebook: Path) -> str:
    """The notebook as Markdown. It holds no outputs."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).replace("../docs/", "")
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    title, rest = parts[0].split("\n", 1)
    where = f"This page is [{notebook.name}]({notebook.name}), `examples/` in the repository."
    return "\n\n".join([title, where, rest, *parts[1:]]) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted((Path(config.config_file_path).parent / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"notebook-{path.stem}.md", content=page(path)))
        files.append(File.generated(config, path.name, abs_src_path=str(path)))
    return files
