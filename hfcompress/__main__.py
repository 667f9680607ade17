"""`python -m hfcompress` is the `hfcompress` command."""

import sys

from hfcompress.cli import main

sys.exit(main())
