"""``gist export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gist.cli.common import add_command, console
from gist.export.folder import export_run
from gist.export.formats import FORMATS


def register(commands: Any) -> None:
    """Add the command to the parser of ``gist``."""
    export = add_command(
        commands, "export", _export, "write a run's model for ONNX, torch.export or timm, checked"
    )
    export.add_argument("run", type=Path, help="the folder of a finished run")
    export.add_argument("--format", required=True, choices=list(FORMATS),
                        help="timm takes only methods that merge into the weights")  # fmt: skip
    export.add_argument("--out", type=Path, help="a new folder; default: RUN/FORMAT")
    export.add_argument("--data", help="what to check the export on; default: the run's")
    export.add_argument("--images", type=int, default=256,
                        help="images to check on at most; default: %(default)s")  # fmt: skip
    export.add_argument("--threads", type=int, help="CPU threads; default: torch's")


def _export(arguments: argparse.Namespace) -> None:
    """Export a finished run, and print the check."""
    out = arguments.out or arguments.run / arguments.format
    check = export_run(
        arguments.run, arguments.format, out, data=arguments.data, images=arguments.images
    )
    console.print(str(check), highlight=False, soft_wrap=True)
    console.print(f"{out}: try python {out / 'classify.py'} IMAGE", highlight=False, soft_wrap=True)
