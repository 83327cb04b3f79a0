"""An HTTP API as a backend: needs the extra `http` (httpx)."""

from __future__ import annotations

try:
    import httpx as httpx
except ImportError as error:
    raise ImportError("HttpBackend needs httpx: pip install 'walbatch[http]'") from error

from walbatch.backends.http.backend import HttpBackend

__all__ = ["HttpBackend"]
