"""Survey: rewrite many architectures and say for each how far it gets.

Start at :func:`madtp.survey.runner.run`; `examination.py` says what is looked at in one model, `record.py` what the outcomes
mean, `tables.py` prints them. Which models there are is the caller's to say: nothing here knows a name.
"""

from madtp.survey.examination import examine
from madtp.survey.record import OUTCOMES, Record, Refusal

__all__ = ["OUTCOMES", "Record", "Refusal", "examine"]
