"""The rules of the oracle, by what they are about. Each is a function of the record and of the event that can break it."""
