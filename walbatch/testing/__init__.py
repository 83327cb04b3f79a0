"""The public test kit: a simulated machine that is worse than any real one, and the oracle that judges an engine on it."""
