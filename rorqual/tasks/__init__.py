"""Floor 1: what can be asked, how it is checked, and the task store. Imports no torch."""

from rorqual.tasks.episode import SUBMIT, AsyncEpisode, Episode, Opening, WorldEpisode
from rorqual.tasks.families import FAMILIES, Family, family, open_episode, validate
from rorqual.tasks.session import ToolCall, WorldSession
from rorqual.tasks.splits import SplitConfig, split_of, splits
from rorqual.tasks.store import Record, Store, task_record, world_record
from rorqual.tasks.task import GateResult, Provenance, Task, TaskError, TaskRow, World, canonical, digest
from rorqual.tasks.toolset import ToolError, Tools, Toolset, schema_of
from rorqual.tasks.verdict import Outcome, Verdict, failed, invalid, passed

__all__ = [
    "FAMILIES",
    "SUBMIT",
    "AsyncEpisode",
    "Episode",
    "Family",
    "GateResult",
    "Opening",
    "Outcome",
    "Provenance",
    "Record",
    "SplitConfig",
    "Store",
    "Task",
    "TaskError",
    "TaskRow",
    "ToolCall",
    "ToolError",
    "Tools",
    "Toolset",
    "Verdict",
    "World",
    "WorldEpisode",
    "WorldSession",
    "canonical",
    "digest",
    "failed",
    "family",
    "invalid",
    "open_episode",
    "passed",
    "schema_of",
    "split_of",
    "splits",
    "task_record",
    "validate",
    "world_record",
]
