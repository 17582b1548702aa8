"""The old name of tests.support.runs, which the scripts in ../shared/cases import with tests/ on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.support.runs import *  # noqa: E402, F403
