"""Search for a schedule under a memory limit; see `auto`."""

from megamem.planner.schedules.search.auto import CHUNK_COUNTS, EFFORT, Candidate, SearchResult, search
from megamem.planner.schedules.search.bounds import Bounds

__all__ = ["CHUNK_COUNTS", "EFFORT", "Bounds", "Candidate", "SearchResult", "search"]
