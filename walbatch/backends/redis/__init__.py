"""Redis as a backend: needs the extra `redis` (redis-py)."""

from __future__ import annotations

try:
    import redis as redis
except ImportError as error:
    raise ImportError("RedisBackend needs redis-py: pip install 'walbatch[redis]'") from error

from walbatch.backends.redis.backend import RedisBackend
from walbatch.backends.redis.keys import RedisKeys

__all__ = ["RedisBackend", "RedisKeys"]
