"""What `SqliteBackend` and `PostgresBackend` share: how operations become rows, and how a batch is applied exactly once.

What is not here: connections, dialects and error codes. Each database's module has those.
"""
