"""The exceptions of the privacy core. Must not hold logic."""


class PrivacyError(ValueError):
    """A privacy setting that cannot be kept. The message names the setting and what to write instead."""


class OneRecordAtATime(PrivacyError):
    """A forward of several records went through an engine that has to see them one by one. PrivateTrainLoop sees to it."""
