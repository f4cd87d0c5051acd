"""Schedules: from jobs to one action list per rank, checked, printed, parsed, simulated and drawn.

Read job.py, action.py and ordering.py first; each other file takes a `Schedule` and tells something about it.
"""

from torch_vtensor.compile.schedules.action import Action, Schedule
from torch_vtensor.compile.schedules.checks import RankMemory, Report, check
from torch_vtensor.compile.schedules.grid import grid
from torch_vtensor.compile.schedules.job import Job, Place, PlanError, Result, Value
from torch_vtensor.compile.schedules.ordering import order_jobs
from torch_vtensor.compile.schedules.picture import draw
from torch_vtensor.compile.schedules.simulate import MemoryAt, Span, Timeline, simulate
from torch_vtensor.compile.schedules.text import dumps, parse
from torch_vtensor.compile.schedules.trace import trace, write_trace

__all__ = [
    "Action",
    "Job",
    "MemoryAt",
    "Place",
    "PlanError",
    "RankMemory",
    "Report",
    "Result",
    "Schedule",
    "Span",
    "Timeline",
    "Value",
    "check",
    "draw",
    "dumps",
    "grid",
    "order_jobs",
    "parse",
    "simulate",
    "trace",
    "write_trace",
]
