"""Threads and time: who commits, who flushes, who checkpoints. No files here; they stand behind ports."""
