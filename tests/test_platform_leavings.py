"""Where each platform keeps logs and artifacts, and what its answers about them say: pure, so without a server."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook_app import platforms
from webhook_app.platforms import (
    Answer,
    Artifact,
    EndedJob,
    LogFile,
    PollError,
    PollTarget,
    Request,
    Source,
    newest,
)

SOURCES = {
    "github": Source("github", "github", "https://api.example.com", "a-token"),
    "gitlab": Source("gitlab", "gitlab", "https://gitlab.example.com", "a-token"),
    "jenkins": Source("jenkins", "jenkins", "https://ci.example.com", "a-token", "relay"),
}
TARGETS = {
    "github": PollTarget("github:octo:web:7", "github:7", "octo/web", 3, 2, None),
    "gitlab": PollTarget("gitlab:5:9", "gitlab:5:9", "group/project", 4, 1, None),
    "jenkins": PollTarget(
        "jenkins:team:web~20app:12", "jenkins:team:web app:12", "team/web app", 12, 1, None
    ),
}
EVERY = pytest.mark.parametrize("name", sorted(SOURCES))


def module(name):
    return platforms.file_api(name)


def test_a_script_has_neither_logs_nor_artifacts():
    assert platforms.file_api("script") is None
    assert platforms.file_api("unknown") is None


def answer(content, status=200, headers=None):
    return Answer(status, headers or {}, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("name", "function", "url"),
    [
        ("github", "ended_jobs_request", "https://api.example.com/repos/octo/web/actions/runs/7/attempts/2/jobs?per_page=100"),
        ("github", "artifacts_request", "https://api.example.com/repos/octo/web/actions/runs/7/artifacts?per_page=100"),
        ("gitlab", "ended_jobs_request", "https://gitlab.example.com/api/v4/projects/5/pipelines/9/jobs?per_page=100"),
        ("gitlab", "artifacts_request", "https://gitlab.example.com/api/v4/projects/5/pipelines/9/jobs?per_page=100"),
        ("jenkins", "artifacts_request", "https://ci.example.com/job/team/job/web%20app/12/api/json?tree=inProgress,artifacts%5BfileName,relativePath%5D"),
        ("jenkins", "ended_jobs_request", None),
    ],
)  # fmt: skip
def test_lists_are_asked_for_with_our_credentials(name, function, url):
    request = getattr(module(name), function)(SOURCES[name], TARGETS[name])
    if url is None:
        assert request is None
        return
    assert request.url == url
    assert {"Authorization", "PRIVATE-TOKEN"} & set(request.headers)


@EVERY
@pytest.mark.parametrize("function", ["ended_jobs_request", "artifacts_request"])
def test_without_an_address_nothing_is_asked(name, function):
    nowhere = Source(name, name)
    assert getattr(module(name), function)(nowhere, TARGETS[name]) is None
    odd = PollTarget("x:y", "x:y", "../..", None, 1, None)
    assert getattr(module(name), function)(SOURCES[name], odd) is None


def job(number, failed=False, ran=True):
    return EndedJob(number, f"job {number}", failed, ran)


@pytest.mark.parametrize(
    ("jobs", "everything", "expected"),
    [
        ([job(1), job(2, failed=True), job(3, failed=True)], False, ["jobs/2/logs", "jobs/3/logs"]),
        ([job(n, failed=True) for n in range(1, 9)], False, [f"jobs/{n}/logs" for n in range(1, 6)]),
        ([job(1), job(2, failed=True)], True, ["runs/7/attempts/2/logs"]),
        ([job(1)], False, ["runs/7/attempts/2/logs"]),
        ([job(1, ran=False)], True, []),
        ([], False, []),
    ],
)
def test_github_reads_the_logs_of_failed_jobs_or_one_zip(jobs, everything, expected):
    files = module("github").log_files(SOURCES["github"], TARGETS["github"], tuple(jobs), everything)
    assert [file.request.url.partition("/actions/")[2] for file in files] == expected
    assert all(file.zipped == ("attempts" in file.request.url) for file in files)


@pytest.mark.parametrize(
    ("jobs", "everything", "expected"),
    [
        ([job(1), job(2, failed=True), job(3, failed=True, ran=False)], False, [2]),
        ([job(1), job(2, failed=True), job(4, ran=False)], True, [2, 1]),
        ([job(1)], False, [1]),
        ([job(1), job(3, failed=True, ran=False)], False, []),
        ([job(n) for n in range(1, 40)], True, list(range(1, 21))),
    ],
)
def test_gitlab_reads_traces_those_of_failed_jobs_first(jobs, everything, expected):
    files = module("gitlab").log_files(SOURCES["gitlab"], TARGETS["gitlab"], tuple(jobs), everything)
    start = "https://gitlab.example.com/api/v4/projects/5/jobs/"
    assert [file.request.url for file in files] == [f"{start}{n}/trace" for n in expected]


def test_jenkins_reads_the_two_ends_of_its_console():
    jenkins = module("jenkins")
    (file,) = jenkins.log_files(SOURCES["jenkins"], TARGETS["jenkins"], (), False)
    assert file.tailed
    assert file.request.url.endswith("/job/team/job/web%20app/12/logText/progressiveText?start=0")
    request, start = jenkins.log_tail(file, {"x-text-size": "5000"}, 100, 1000)
    assert (request.url.endswith("start=4000"), start) == (True, 4000)
    assert request.headers == file.request.headers
    assert jenkins.log_tail(file, {"x-text-size": "900"}, 100, 1000)[1] == 100
    for size in ("", "x", "-5", "9" * 30):
        assert jenkins.log_tail(file, {"x-text-size": size}, 100, 1000) is None
    assert jenkins.log_grows({"x-more-data": "true"})
    assert not jenkins.log_grows({})


def test_jobs_that_never_ran_have_no_log():
    jobs = module("github").parse_ended_jobs(answer({"jobs": [
        {"id": 1, "name": "a", "conclusion": "failure", "steps": []},
        {"id": 2, "name": "b", "conclusion": "skipped", "steps": []},
        {"id": 3, "name": "c", "conclusion": "cancelled", "steps": []},
        {"id": 4, "name": "d", "conclusion": "cancelled", "steps": [{"number": 1}]},
        {"id": 5, "conclusion": "success", "steps": [{}]},
        {"name": "no id"}, "odd",
    ]}))  # fmt: skip
    assert jobs == (
        EndedJob(1, "a", True, True), EndedJob(2, "b", False, False), EndedJob(3, "c", False, False),
        EndedJob(4, "d", False, True), EndedJob(5, "5", False, True),
    )  # fmt: skip
    at = "2026-11-01T10:00:00.000Z"
    jobs = module("gitlab").parse_ended_jobs(answer([
        {"id": 1, "name": "a", "status": "failed", "started_at": at},
        {"id": 2, "name": "b", "status": "failed", "started_at": at, "allow_failure": True},
        {"id": 3, "name": "c", "status": "failed", "started_at": None},
        {"id": 4, "name": "d", "status": "success", "started_at": at, "erased_at": at},
    ]))  # fmt: skip
    assert jobs == (
        EndedJob(1, "a", True, True), EndedJob(2, "b", False, True), EndedJob(3, "c", True, False),
        EndedJob(4, "d", False, False),
    )  # fmt: skip


def test_of_artifacts_with_one_name_the_newest_counts():
    digest = "sha256:" + "ab" * 32
    listed = [
        {"id": 11, "name": "dist", "size_in_bytes": 5, "created_at": "2026-11-01T10:00:00Z", "digest": digest.upper()},
        {"id": 12, "name": "dist", "size_in_bytes": 6, "created_at": "2026-11-01T11:00:00Z", "digest": None,
         "expired": True, "expires_at": "2027-01-01T00:00:00Z"},
        {"id": 13, "name": "a/b ..", "size_in_bytes": -1, "created_at": None, "digest": "md5:abc"},
        {"id": 14, "name": ""}, {"name": "no id"}, 7,
    ]  # fmt: skip
    found = module("github").parse_artifacts(answer({"artifacts": listed}))
    assert [(one.name, one.ref, one.size_bytes, one.digest, one.expired) for one in found] == [
        ("a/b ..", "13", None, None, False), ("dist", "12", 6, None, True),
    ]  # fmt: skip
    (first,) = module("github").parse_artifacts(answer({"artifacts": listed[:1]}))
    assert first.digest == digest


def test_gitlab_lists_archives_only():
    found = module("gitlab").parse_artifacts(answer([
        {"id": 1, "name": "build: [a/b]", "finished_at": "2026-11-01T10:00:00Z", "artifacts_expire_at": None,
         "artifacts": [{"file_type": "trace", "size": 3}, {"file_type": "archive", "size": 1000}]},
        {"id": 2, "name": "test", "artifacts": [{"file_type": "junit", "size": 5}]},
        {"id": 3, "name": "none", "artifacts": None},
    ]))  # fmt: skip
    assert [(one.name, one.ref, one.size_bytes) for one in found] == [("build: [a/b]", "1", 1000)]


def test_jenkins_paths_do_not_climb():
    jenkins = module("jenkins")
    files = [
        {"relativePath": path} for path in ("dist/a b.zip", "../x", "/etc/x", "a//b", "a/./b", "š.txt", None)
    ]
    found = jenkins.parse_artifacts(answer({"inProgress": False, "artifacts": files}))
    assert [one.name for one in found] == ["dist/a b.zip", "š.txt"]
    request = jenkins.artifact_request(SOURCES["jenkins"], TARGETS["jenkins"], "dist/a b.zip")
    assert request.url == "https://ci.example.com/job/team/job/web%20app/12/artifact/dist/a%20b.zip"
    assert jenkins.artifact_request(SOURCES["jenkins"], TARGETS["jenkins"], "../../x") is None
    with pytest.raises(PollError):
        jenkins.parse_artifacts(answer({"inProgress": True, "artifacts": []}))


@pytest.mark.parametrize(
    ("name", "ref", "url"),
    [
        ("github", "12", "https://api.example.com/repos/octo/web/actions/artifacts/12/zip"),
        ("github", "12/../x", None),
        ("gitlab", "3", "https://gitlab.example.com/api/v4/projects/5/jobs/3/artifacts"),
        ("gitlab", "x", None),
    ],
)
def test_downloads(name, ref, url):
    request = module(name).artifact_request(SOURCES[name], TARGETS[name], ref)
    assert (request.url if request else None) == url


# ---- answers nobody expects ------------------------------------------------------------------

strange = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["id", "name", "jobs", "artifacts", "steps", "conclusion", "status", "digest", "created_at",
                         "relativePath", "message", "path", "annotation_level", "start_line", "file_type", "size"]),
        inner, max_size=6,
    ),
    max_leaves=12,
)  # fmt: skip


@given(strange, st.sampled_from(sorted(SOURCES)))
def test_strange_answers_are_read_or_refused(content, name):
    for parse in (
        module(name).parse_ended_jobs,
        module(name).parse_artifacts,
        module(name).parse_annotations,
    ):
        for wrapped in (content, [content], {"jobs": [content], "artifacts": [content]}):
            try:
                found = parse(answer(wrapped))
            except PollError:
                continue
            assert isinstance(found, tuple)


@EVERY
def test_there_is_something_for_everything(name):
    """What `pollers.endings` calls exists on every platform, also where it has nothing to say."""
    platform, file = module(name), LogFile("x", Request("https://x", {}))
    assert isinstance(platform.log_grows({}), bool)
    assert name == "jenkins" or platform.log_tail(file, {"x-text-size": "1"}, 0, 1) is None
    request = platform.annotations_request(SOURCES[name], TARGETS[name], job(1, failed=True))
    assert (request is not None) == (name == "github")
    if name != "github":
        assert platform.parse_annotations(answer([])) == ()


def test_newest_keeps_one_of_each_name_in_order():
    assert newest([]) == ()
    assert [one.ref for one in newest([Artifact("b", "1"), Artifact("a", "2"), Artifact("b", "3")])] == [
        "2",
        "3",
    ]
