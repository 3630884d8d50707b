"""``python -m autosparse_fx`` is ``autosparse-fx``."""

import sys

from autosparse_fx.cli.main import main

sys.exit(main())
