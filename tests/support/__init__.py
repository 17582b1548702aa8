"""What several tests share: data sets, models, trainings and reference computations. Must hold no test.

Import it as ``from tests.support.models import build``. forking.py and rank_steps.py are programs as well, which tests start with
``python -m``.
"""
