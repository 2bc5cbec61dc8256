"""Bodies of the Notification plugin's webhooks and of Jenkins' remote API.  Pure.

Fields: the sources of Jenkins core (`Run`), workflow-job and the notification plugin.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from webhook_app.simulated.facts import Build, Event, Moment

_FLOW_RUN = "org.jenkinsci.plugins.workflow.job.WorkflowRun"
QUIET_SECONDS = 5.0
"""How long a build waits in the queue before it begins."""
NOTE = "\x1b[8mha:////4AAAAKB+LCAAAAAAAAP9b85aBtbiIQTGjNKU4P08vOT+vOD8nVc83PyU1x6OyILUo\x1b[0m"
"""A console note: bytes of the raw log that no reader gets to see."""


def job_path(build: Build) -> str:
    """`job/FOLDER/job/NAME/`, as Jenkins nests folders."""
    return f"job/{build.repository.owner}/job/{build.repository.name}/"


def build_path(build: Build) -> str:
    """`job/FOLDER/job/NAME/NUMBER/`."""
    return f"{job_path(build)}{build.number}/"


def milliseconds(at: float) -> int:
    """Jenkins' time."""
    return int(at * 1000)


def webhook(build: Build, moment: Moment, event: Event, base: str) -> dict[str, Any]:
    """The Notification plugin's JSON for one phase; members without a value are left out."""
    over = event.action in ("COMPLETED", "FINALIZED")
    queued_early = 2 if event.action == "QUEUED" else 0  # its time is computed back
    told: dict[str, Any] = {
        "full_url": f"{base}/{build_path(build)}", "number": build.number, "queue_id": build.run_id,
        "timestamp": milliseconds(moment.at) - queued_early,
        "duration": milliseconds(moment.at - build.begins_at) if over else 0, "phase": event.action,
    }  # fmt: skip
    if over:
        told["status"] = moment.conclusion
    told |= {
        "url": build_path(build), "scm": _scm(build, base), "log": "", "artifacts": artifacts(build, moment,
        base),
    }  # fmt: skip
    name = build.repository.name
    return {"name": name, "display_name": name, "url": job_path(build), "build": told}


def _scm(build: Build, base: str) -> dict[str, Any]:
    return {
        "url": f"{base}/git/{build.repository.full_name}.git", "branch": f"origin/{build.branch}",
        "commit": build.commit, "changes": [], "culprits": [],
    }  # fmt: skip


def artifacts(build: Build, moment: Moment, base: str) -> dict[str, Any]:
    """Archived files; they are complete only when the build is finalized."""
    if moment.status != "finalized" or moment.conclusion != "SUCCESS":
        return {}
    return {"dist/app.txt": {"archive": f"{base}/{build_path(build)}artifact/dist/app.txt"}}


def api_build(build: Build, moment: Moment, base: str, now: float, estimated_ms: int) -> dict[str, Any]:
    """`GET …/N/api/json` without a tree; `estimated_ms` -1: nobody knows how long it takes."""
    building = moment.status == "building"
    spent = milliseconds(moment.at - build.begins_at)
    share = int((now - build.begins_at) * 100_000 / estimated_ms) if estimated_ms > 0 else -1
    executor = {"_class": "hudson.model.OneOffExecutor", "number": -1, "progress": min(share, 99)}
    archived = artifacts(build, moment, base)
    return {
        "_class": _FLOW_RUN, "actions": _actions(build, base), "number": build.number,
        "id": str(build.number),
        "url": f"{base}/{build_path(build)}", "building": building,
        "inProgress": moment.status != "finalized",
        "result": moment.conclusion, "duration": 0 if building else spent, "estimatedDuration": estimated_ms,
        "timestamp": milliseconds(build.begins_at), "queueId": build.run_id,
        "displayName": f"#{build.number}",
        "fullDisplayName": f"{build.repository.owner} » {build.repository.name} #{build.number}",
        "description": None, "keepLog": False, "executor": executor if building else None,
        "artifacts": [
            {"displayPath": path.rpartition("/")[2], "fileName": path.rpartition("/")[2],
            "relativePath": path}
            for path in archived
        ],
        "changeSets": [], "culprits": [], "nextBuild": None, "previousBuild": None,
    }  # fmt: skip


def _actions(build: Build, base: str) -> list[dict[str, Any]]:
    revision = {"SHA1": build.commit, "branch": [{"SHA1": build.commit, "name": f"origin/{build.branch}"}]}
    return [
        {"_class": "hudson.model.CauseAction", "causes": [{"shortDescription": "Started by an SCM change"}]},
        {
            "_class": "hudson.plugins.git.util.BuildData", "lastBuiltRevision": revision,
            "remoteUrls": [f"{base}/git/{build.repository.full_name}.git"], "scmName": "",
        },
    ]  # fmt: skip


def queue_item(build: Build, base: str, now: float, cancelled: bool) -> dict[str, Any]:
    """`GET /queue/item/ID/api/json`: waiting in the quiet period, cancelled, or left for its build."""
    left, rest = now >= build.begins_at, build.begins_at - now
    item: dict[str, Any] = {
        "_class": f"hudson.model.Queue${'LeftItem' if left or cancelled else 'WaitingItem'}", "actions": [],
        "blocked": False, "buildable": False, "id": build.run_id,
        "inQueueSince": milliseconds(build.begins_at - QUIET_SECONDS), "params": "", "stuck": False,
        "task": {
            "_class": "org.jenkinsci.plugins.workflow.job.WorkflowJob", "name": build.repository.name,
            "url": f"{base}/{job_path(build)}", "color": "blue_anime" if left else "blue",
        },
        "url": f"queue/item/{build.run_id}/", "why": None,
    }  # fmt: skip
    if not left and not cancelled:
        why = f"In the quiet period. Expires in {rest:.1f} sec"
        return item | {"why": why, "timestamp": milliseconds(build.begins_at)}
    if cancelled:
        return item | {"cancelled": True, "executable": None}
    place = {"number": build.number, "url": f"{base}/{build_path(build)}"}
    return item | {"cancelled": False, "executable": {"_class": _FLOW_RUN, **place}}


def stages(build: Build, moment: Moment) -> dict[str, Any]:
    """`GET …/N/wfapi/describe`: the stages that have begun, none of the future."""
    words = {"SUCCESS": "SUCCESS", "FAILURE": "FAILED", "NOT_BUILT": "NOT_EXECUTED", None: "IN_PROGRESS"}
    status = words.get(moment.conclusion, str(moment.conclusion))
    return {
        "_links": {"self": {"href": f"/{build_path(build)}wfapi/describe"}}, "id": str(build.number),
        "name": f"#{build.number}", "status": "IN_PROGRESS" if moment.status == "building" else status,
        "startTimeMillis": milliseconds(build.begins_at), "endTimeMillis": milliseconds(moment.at),
        "durationMillis": milliseconds(moment.at - build.begins_at), "queueDurationMillis": 2,
        "pauseDurationMillis": 0,
        "stages": [
            {
                "_links": {}, "id": str(one.id), "name": one.name, "execNode": "", "status": one.status,
                "startTimeMillis": milliseconds(one.started_at or moment.at),
                "durationMillis": milliseconds((one.finished_at or moment.at) - (one.started_at or 0.0)),
                "pauseDurationMillis": 0,
            }
            for one in moment.jobs
        ],
    }  # fmt: skip


class Each(Sequence[dict[str, Any]]):
    """A list whose items are only made when somebody looks at them."""

    def __init__(self, items: Sequence[Any], make: Callable[[Any], dict[str, Any]]) -> None:
        self._items = items
        self._make = make

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Each(self._items[index], self._make)
        return self._make(self._items[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._make, self._items)


# tree= -------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\w+|[\[\],]|\{\d*,?\d*\}")


def prune(content: Mapping[str, Any], tree: str) -> dict[str, Any]:
    """What `tree=` leaves of an object: `a,b[c,d]{0,20}`; without a tree everything.  `_class` stays."""
    wanted, _ = _parse(_TOKEN.findall(tree), 0) if tree else (None, 0)
    pruned: dict[str, Any] = _pruned(content, wanted)
    return pruned


_Wanted = dict[str, tuple[Any, str]]


def _parse(tokens: list[str], at: int) -> tuple[_Wanted, int]:
    """Names with their own sub-tree and range, up to the closing bracket."""
    wanted: _Wanted = {}
    while at < len(tokens) and tokens[at] != "]":
        name, inner, span = tokens[at], None, ""
        at += 1
        if tokens[at : at + 1] == ["["]:
            inner, at = _parse(tokens, at + 1)
            at += 1
        if at < len(tokens) and tokens[at].startswith("{"):
            span, at = tokens[at], at + 1
        if name != ",":
            wanted[name] = (inner, span)
    return wanted, at


def _pruned(content: Any, wanted: _Wanted | None) -> Any:
    if isinstance(content, list | Each):
        return [_pruned(item, wanted) for item in content]
    if not isinstance(content, Mapping):
        return content
    if wanted is None:
        return {name: _pruned(value, None) for name, value in content.items()}
    kept = {"_class": content["_class"]} if "_class" in content else {}
    for name, (inner, span) in wanted.items():
        if name in content:
            kept[name] = _pruned(_cut(content[name], span), inner)
    return kept


def _cut(content: Any, span: str) -> Any:
    """`{M,N}`: from M up to but not with N."""
    if not span or not isinstance(content, list | Each):
        return content
    first, _, last = span.strip("{}").partition(",")
    if not last and "," not in span:
        return content[int(first) : int(first) + 1]
    return content[int(first or 0) : int(last) if last else None]
