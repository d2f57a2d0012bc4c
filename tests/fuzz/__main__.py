"""``python -m tests.fuzz``. The modules that tests share are imported by name, so their folder comes first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tests.fuzz.command import main

sys.exit(main())
