"""Files and LMDB: the log, its segments and the checkpoint store, behind the ports."""
