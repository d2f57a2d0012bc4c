"""The lock of all captures of a process: :data:`CAPTURE_LOCK`.

``torch.export`` patches parts of torch while it traces, so two captures at a time disturb each other. Programs that are there
run meanwhile.
"""

from __future__ import annotations

import threading

CAPTURE_LOCK = threading.RLock()
