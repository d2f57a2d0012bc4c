"""Survey: rewrite many architectures, and report for each how far it gets.

It takes names of models and a module that builds them, and gives a record for each name. Start at
:func:`madtp.survey.runner.run`. ``examination.py`` says what is measured on one model, ``record.py`` what the outcomes mean,
and ``tables.py`` prints them. The caller chooses the models: nothing here knows a name.
"""

from madtp.survey.examination import examine
from madtp.survey.record import OUTCOMES, Record, RefusalRecord

__all__ = ["OUTCOMES", "Record", "RefusalRecord", "examine"]
