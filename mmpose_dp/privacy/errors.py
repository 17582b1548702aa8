"""The exceptions. A message says what is wrong, where (the config key) and what to write instead. Must not hold logic."""


class PrivacyError(ValueError):
    """A private training cannot be run as configured. All other exceptions here are kinds of it."""


class ConfigError(PrivacyError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(PrivacyError):
    """A data set or an annotation file cannot be used for private training."""


class LedgerError(PrivacyError):
    """A privacy ledger is missing or damaged, or belongs to another training."""


class BudgetError(PrivacyError):
    """A privacy budget is spent, or no noise meets it."""


class UnsupportedModelError(PrivacyError):
    """A model, or a layer of it, cannot be made private."""
