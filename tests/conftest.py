"""Set-up that every test shares. Must not hold fixtures that only one part of the package needs."""

import mmpose_dp  # noqa: F401  (first: its compat mends the install before a test imports mmpose)
