"""The engine of one store: what users open, and how its parts are wired.

`engine` is its public face, `opening` makes it, `assembly` holds the parts together, `submission` takes operations in,
`requeueing` dead letters, and `closing` ends it.
"""

from walbatch.engine.assembly import Environment
from walbatch.engine.engine import Engine
from walbatch.engine.submission import FROM_SETTINGS, Payload

__all__ = ["FROM_SETTINGS", "Engine", "Environment", "Payload"]
