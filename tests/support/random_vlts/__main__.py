"""``python -m random_vlts``. What it runs lies in ``fuzz.py``, as worker processes cannot import a package's ``__main__``."""

import sys

from random_vlts.fuzz import main

sys.exit(main())
