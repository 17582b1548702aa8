"""The one exception of the privacy core. Must not hold logic."""


class PrivacyError(ValueError):
    """A privacy setting that cannot be kept. The message names the setting and what to write instead."""
