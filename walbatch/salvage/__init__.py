"""Gives up what is damaged, and says exactly what: the one place that changes a store which recovery refuses.

What is not here: guessing. A frame is kept only if its header and body are whole in their place; LSNs that
nothing names are listed as lost and stand as void frames from then on, so that later openings see a
contiguous log.

The idea needed to read it: repairs are planned on the facts alone, each giving the facts that it would leave, until
recovery would refuse no more. Only then is anything written: each damaged segment is copied to quarantine/ as it is,
rebuilt from its whole frames under a temporary name, and replaced by a rename.
"""

from walbatch.salvage.salvaging import Salvage, salvage_store

__all__ = ["Salvage", "salvage_store"]
