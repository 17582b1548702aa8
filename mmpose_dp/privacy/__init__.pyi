# What a type checker sees of __init__.py, which imports these names when they are first used.

from .accounting import (
    ACCOUNTANTS as ACCOUNTANTS,
)
from .accounting import (
    StepEvent as StepEvent,
)
from .accounting import (
    epsilon as epsilon,
)
from .accounting import (
    group_epsilon as group_epsilon,
)
from .calibration import calibrate_noise_multiplier as calibrate_noise_multiplier
from .calibration import steps_within as steps_within
from .clipping import ClippedCoordinates as ClippedCoordinates
from .clipping import ClippedSum as ClippedSum
from .clipping import clip_factors as clip_factors
from .errors import (
    BudgetError as BudgetError,
)
from .errors import (
    ConfigError as ConfigError,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    LedgerError as LedgerError,
)
from .errors import (
    PrivacyError as PrivacyError,
)
from .errors import (
    UnsupportedModelError as UnsupportedModelError,
)
from .ledger import LEDGER_NAME as LEDGER_NAME
from .ledger import Ledger as Ledger
from .mechanism import GaussianMechanism as GaussianMechanism
from .noise import RandomSource as RandomSource
from .plan import PrivacyPlan as PrivacyPlan
from .projection import Projector as Projector
from .records import Block as Block
from .records import Collector as Collector
from .records import Samples as Samples
from .sampling import PoissonSampling as PoissonSampling
from .statement import build_statement as build_statement
from .validation import as_given as as_given
from .validation import rounded_up as rounded_up
