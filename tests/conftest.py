"""Hypothesis profiles, chosen with HYPOTHESIS_PROFILE: `dev` (the default), `ci` or `nightly`."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "dev",
    # A deadline measures the machine, not the code: pytest's faulthandler timeout catches what hangs.
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# The same examples on every run, so that a red build means a change and not a lucky draw.
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
