"""`walbatch bench`: the same durable work for walbatch, for the disk itself and for other queues, in one run.

What is not here: any part of the engine, which is used through the public `walbatch` alone. Nothing of this is imported unless
the command runs, and no peer unless it is measured.

The idea needed to read it: a *subject* (walbatch, the raw disk, a peer) does the work of a *workload*, once in each *round*; what a
machine does meanwhile hits all of a round alike, so ratios within a round are what counts.
"""
