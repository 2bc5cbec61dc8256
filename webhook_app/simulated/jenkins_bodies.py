"""Bodies of the Notification plugin's webhooks and of Jenkins' remote API.  Pure.

Fields: the sources of Jenkins core (`Run`), workflow-job and the notification plugin.
"""

import re
from collections.abc import Mapping
from typing import Any

from webhook_app.simulated.facts import Build, Event, Moment

_FLOW_RUN = "org.jenkinsci.plugins.workflow.job.WorkflowRun"
ESTIMATED_MS = 24_000
"""What every job believes that a build takes."""


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


def api_build(build: Build, moment: Moment, base: str, now: float) -> dict[str, Any]:
    """`GET …/N/api/json` without a tree."""
    building = moment.status == "building"
    spent = milliseconds(moment.at - build.begins_at)
    progress = min(int((now - build.begins_at) * 100_000 / ESTIMATED_MS), 99)
    executor = {"_class": "hudson.model.OneOffExecutor", "number": -1, "progress": max(progress, 0)}
    archived = artifacts(build, moment, base)
    return {
        "_class": _FLOW_RUN, "actions": _actions(build, base), "number": build.number,
        "id": str(build.number),
        "url": f"{base}/{build_path(build)}", "building": building,
        "inProgress": moment.status != "finalized",
        "result": moment.conclusion, "duration": 0 if building else spent, "estimatedDuration": ESTIMATED_MS,
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


# tree= -------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\w+|[\[\],]|\{\d*,?\d*\}")


def prune(content: Mapping[str, Any], tree: str) -> dict[str, Any]:
    """What `tree=` leaves of an object: `a,b[c,d]{0,20}`; without a tree everything.  `_class` stays."""
    if not tree:
        return dict(content)
    wanted, _ = _parse(_TOKEN.findall(tree), 0)
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
    if isinstance(content, list):
        return [_pruned(item, wanted) for item in content]
    if not isinstance(content, Mapping) or wanted is None:
        return content
    kept = {"_class": content["_class"]} if "_class" in content else {}
    for name, (inner, span) in wanted.items():
        if name in content:
            kept[name] = _cut(_pruned(content[name], inner), span)
    return kept


def _cut(content: Any, span: str) -> Any:
    """`{M,N}`: from M up to but not with N."""
    if not span or not isinstance(content, list):
        return content
    first, _, last = span.strip("{}").partition(",")
    if not last and "," not in span:
        return content[int(first) : int(first) + 1]
    return content[int(first or 0) : int(last) if last else None]
