"""The tutorial's commands, from the page itself: the whole tour works.

The tour takes minutes, so it runs only under ``make test-tutorial``.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gist.data.offline import SOURCES

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
TEXT = re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.S)
COMMANDS = re.findall(r"^    (\S.*)$", re.sub(r" \\\n +", " ", TEXT), re.M)
INSTALLING = ("pip ", "sudo ")


@pytest.mark.skipif(
    not os.environ.get("GIST_TEST_TUTORIAL"), reason="takes minutes; make test-tutorial runs it"
)
def test_the_tour_works(tmp_path):
    stamps = SOURCES["tuxpaint-stamps"].find()
    if stamps is None:
        pytest.skip("the images' package is missing: apt-get install tuxpaint-stamps-default")
    tour = "\n".join(c for c in COMMANDS if not c.startswith(INSTALLING))
    tour = tour.replace("/usr/share/tuxpaint/stamps", shlex.quote(str(stamps)))
    tour = re.sub(r"--minutes \d+", "--minutes 1", tour)
    python = shlex.quote(sys.executable)
    prelude = f'set -ex\ngist() {{ {python} -m gist.cli "$@"; }}\npython() {{ {python} "$@"; }}\n'
    # Under xdist, tests have one thread.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(
        ["bash", "-c", prelude + tour], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | threads,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predicted = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert len(predicted) == 6
    printed = done.stdout.splitlines()
    alone = list(csv.DictReader(printed[printed.index("image,class,probability") :]))
    assert [row["class"] for row in alone] == [row["class"] for row in predicted]
    page = PAGE.read_text()
    shown = list(
        csv.DictReader(re.search(r"```text\n(image,class.*?)```", page, re.S)[1].splitlines())
    )
    assert [row["image"] for row in predicted] == [row["image"] for row in shown]
    for file in re.findall(r"`([\w.]+\.\w+)`", page.partition("holds:")[2].partition("\n\nThe")[0]):
        assert (tmp_path / "runs" / "stamps" / file).is_file(), file
