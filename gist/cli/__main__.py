"""``python -m gist.cli`` is the ``gist`` command, for launchers such as torchrun."""

import sys

from gist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
