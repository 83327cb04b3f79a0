"""A simulated machine for crash tests: storage that loses all it may, virtual time, seeded threads, and an oracle.

An `Explorer` takes a function that opens an engine on the ports of a simulated `Process`, and a `Workload`; it crashes the
engine everywhere, recovers it, and asks the `Oracle`. All parts also work alone.
"""

from walbatch.testing.simulation.backend import BackendDisk, Manner, ModelBackend, TransactionalModelBackend
from walbatch.testing.simulation.clock import ManualClock, SeededEntropy
from walbatch.testing.simulation.disk import FailedSync
from walbatch.testing.simulation.explore import Explorer, Failure, Plan, Report, sweep_faults
from walbatch.testing.simulation.faults import Fault, FaultPlan
from walbatch.testing.simulation.filesystem import Room, SimulatedFileSystem
from walbatch.testing.simulation.images import Cut, Image, crash_images
from walbatch.testing.simulation.laneplan import LanePlan
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.oracle import Oracle
from walbatch.testing.simulation.scheduler import Deadlock, Livelock, ProcessKilled, Scheduler
from walbatch.testing.simulation.state import SimulatedState, StateDisk
from walbatch.testing.simulation.workload import Session, Workload

__all__ = [
    "BackendDisk",
    "Cut",
    "Deadlock",
    "Explorer",
    "FailedSync",
    "Failure",
    "Fault",
    "FaultPlan",
    "Image",
    "LanePlan",
    "Livelock",
    "Machine",
    "Manner",
    "ManualClock",
    "ModelBackend",
    "Oracle",
    "Plan",
    "Process",
    "ProcessKilled",
    "Report",
    "Room",
    "Scheduler",
    "SeededEntropy",
    "Session",
    "SimulatedFileSystem",
    "SimulatedState",
    "StateDisk",
    "TransactionalModelBackend",
    "Workload",
    "crash_images",
    "sweep_faults",
]
