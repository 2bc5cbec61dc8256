"""The simulated Jenkins answers as the real one: trees of folders, the queue, logs that grow, permissions."""

import base64
import io
import json
import zipfile

import pytest

from tests.asking import ask, one_build, told, world_of
from webhook_app.simulated.ci import LOGGED_SECRETS
from webhook_app.simulated.jenkins import JenkinsServer
from webhook_app.simulated.world import REPOSITORIES, StepClock, busy_world

ACCOUNT = {"Authorization": "Basic " + base64.b64encode(b"buildrelay:simulated-jenkins-token").decode()}


@pytest.fixture
def clock():
    return StepClock(1_795_000_000.25)


def get(server, url, headers=ACCOUNT, **query):
    return ask(server, url, headers=headers, **query)


# Trees -------------------------------------------------------------------------------------------


def test_one_request_reads_all_jobs_of_a_folder_or_of_the_controller(clock):
    world = world_of(clock, "jenkins", "success", builds=60)
    clock.at = world.ends_at
    expected = {
        place.name: [build.number for build in world.of(place)][::-1][:20]
        for place in REPOSITORIES["jenkins"]
    }
    with JenkinsServer(world, port=None) as server:
        builds = "builds[number,building,result]{0,20}"
        folder = told(get(server, "/job/platform/api/json", tree=f"jobs[name,url,{builds}]"))
        assert {job["name"]: [b["number"] for b in job["builds"]] for job in folder["jobs"]} == expected
        assert set(folder["jobs"][0]) == {"_class", "name", "url", "builds"}
        assert set(folder["jobs"][0]["builds"][0]) == {"_class", "number", "building", "result"}
        root = told(get(server, "/api/json", tree=f"jobs[name,jobs[name,{builds}]]"))
        assert [(one["name"], one["jobs"]) for one in root["jobs"]] == [
            ("platform", [{key: job[key] for key in job if key != "url"} for job in folder["jobs"]])
        ]
        assert set(told(get(server, "/job/platform/api/json"))["jobs"][0]) == {
            "_class", "name", "url", "color",
        }  # fmt: skip
        assert get(server, "/job/nothing/api/json").status == 404


def test_a_list_has_the_newest_hundred_builds_only(clock):
    world = busy_world(clock, active=150, repositories=1, platform="jenkins")
    url = f"/job/{world.places['jenkins'][0].owner}/job/repo-0/api/json"
    with JenkinsServer(world, port=None) as server:
        begun = [build.number for build in world.begun(world.places["jenkins"][0], clock())]
        assert [b["number"] for b in told(get(server, url, tree="builds[number]"))["builds"]] == begun[:100]
        assert len(told(get(server, url, tree="allBuilds[number]"))["allBuilds"]) == len(begun) > 100
        third = told(get(server, url, tree="builds[number]{2}"))["builds"]
        assert [build["number"] for build in third] == begun[2:3]


def test_a_controller_of_many_jobs_is_read_at_once(clock):
    world = busy_world(clock, active=400, repositories=40, platform="jenkins", build_seconds=600)
    with JenkinsServer(world, port=None) as server:
        tree = "jobs[name,jobs[name,builds[number,building]{0,30}]]"
        root = told(get(server, "/api/json", tree=tree))
        running = sum(
            build["building"] for folder in root["jobs"] for job in folder["jobs"] for build in job["builds"]
        )
        truly = [
            build for build in world.builds
            if (moment := build.moment_at(clock())) and moment.status == "building"
        ]  # fmt: skip
        assert running == len(truly) > 300
        assert server.count() == 1


# Builds ------------------------------------------------------------------------------------------


def test_estimate_and_progress_come_from_the_builds_before(clock):
    world = world_of(clock, "jenkins", "success", builds=1, spread_seconds=0)
    first = world.builds[0]
    with JenkinsServer(world, port=None) as server:
        fresh = told(get(server, f"{server.path_of(first)}/api/json"))
        assert (fresh["estimatedDuration"], fresh["executor"]["progress"]) == (-1, -1)
        clock.at = first.ends_at
        assert told(get(server, f"{server.path_of(first)}/api/json"))["executor"] is None
        while len(world.of(first.repository)) < 2:
            world.extend(1, spread_seconds=0)
        second, spent = world.of(first.repository)[1], first.ends_at - first.begins_at
        clock.advance(spent / 2)
        later = told(get(server, f"{server.path_of(second)}/api/json"))
        assert later["estimatedDuration"] == int(spent * 1000)
        assert later["executor"]["progress"] == pytest.approx(50, abs=1)


def test_a_freestyle_job_has_no_stages(clock):
    world, build = one_build(clock, "jenkins", "success")
    with JenkinsServer(world, port=None) as server:
        assert told(get(server, f"{server.path_of(build)}/wfapi/describe"))["status"] == "IN_PROGRESS"
        server.freestyle.add(build.repository.full_name)
        assert get(server, f"{server.path_of(build)}/wfapi/describe").status == 404
        about = told(get(server, f"{server.path_of(build)}/api/json"))
        assert about["_class"] == "hudson.model.FreeStyleBuild"


def test_a_queue_item_waits_has_its_build_and_is_gone_five_minutes_later(clock):
    world = world_of(clock, "jenkins", "success", builds=2, spread_seconds=100)
    build = world.builds[1]
    item = f"/queue/item/{build.run_id}/api/json"
    with JenkinsServer(world, port=None) as server:
        assert get(server, item).status == 404
        clock.at = build.begins_at - 3
        waiting = told(get(server, item))
        assert (waiting["why"], "executable" in waiting) == (
            "In the quiet period. Expires in 3.0 sec", False,
        )  # fmt: skip
        assert [one["id"] for one in told(get(server, "/queue/api/json"))["items"]] == [build.run_id]
        clock.at = build.begins_at
        left = told(get(server, item))
        assert left["executable"]["number"] == build.number
        assert left["executable"]["url"] == f"{server.url}{server.path_of(build)}/"
        assert told(get(server, "/queue/api/json"))["items"] == []
        clock.advance(299.9)
        assert get(server, item).status == 200
        clock.advance(0.1)
        assert get(server, item).status == 404


def test_a_build_that_is_cancelled_in_the_queue_never_gets_a_number(clock):
    world = world_of(clock, "jenkins", "success", builds=2, spread_seconds=100)
    build = world.builds[1]
    with JenkinsServer(world, port=None) as server:
        clock.at = build.begins_at - 3
        server.cancel_queued(build.build_id)
        clock.at = build.begins_at + 1
        item = told(get(server, f"/queue/item/{build.run_id}/api/json"))
        assert (item["cancelled"], item["executable"]) == (True, None)
        assert get(server, f"{server.path_of(build)}/api/json").status == 404


# Logs and artifacts -----------------------------------------------------------------------------


def test_a_log_is_read_bit_by_bit_by_its_raw_size(clock):
    world, build = one_build(clock, "jenkins", "failure")
    url = f"{server_path(build)}/logText/progressiveText"
    with JenkinsServer(world, port=None) as server:
        read, start, more = b"", 0, []
        for moment in build.moments:
            clock.at = moment.at
            answer = get(server, url, start=start)
            read += answer.body
            start = int(answer.headers["X-Text-Size"])
            more.append("X-More-Data" in answer.headers)
        assert read == get(server, f"{server_path(build)}/consoleText").body
        assert start > len(read), "hidden notes count"
        assert more == [moment.status == "building" for moment in build.moments]
        assert read.count(b"Finished: FAILURE") == 1
        assert b"ERROR: script returned exit code 1" in read
        assert LOGGED_SECRETS["jenkins"].encode() in read
        assert get(server, url, start=start + 1).body == read, "a log that was replaced begins anew"
        server.log_bytes = 500_000
        assert len(get(server, url).body) > 500_000


def server_path(build):
    return f"/job/{build.repository.owner}/job/{build.repository.name}/{build.number}"


def test_artifacts_are_complete_when_the_build_is_finalized(clock):
    world, build = one_build(clock, "jenkins", "success")
    with JenkinsServer(world, port=None) as server:
        url = f"{server_path(build)}/artifact/dist/app.txt"
        clock.at = build.ends_at - 0.001
        assert get(server, url).status == 404
        clock.at = build.ends_at
        listed = told(get(server, f"{server_path(build)}/api/json", tree="artifacts[relativePath]"))
        assert [one["relativePath"] for one in listed["artifacts"]] == ["dist/app.txt"]
        content = get(server, url).body
        whole = get(server, f"{server_path(build)}/artifact/*zip*/archive.zip").body
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            assert archive.read("archive/dist/app.txt") == content
        server.artifact_bytes = 10_000
        assert len(get(server, url).body) == len(content) + 10_000


# Permissions ------------------------------------------------------------------------------------


def test_who_may_not_look_gets_403_and_a_hidden_job_is_404(clock):
    world, build = one_build(clock, "jenkins", "success")
    paths = ["/api/json", "/job/platform/api/json", *(
        f"{server_path(build)}/{rest}" for rest in ("api/json", "consoleText", "wfapi/describe")
    )]  # fmt: skip
    with JenkinsServer(world, port=None) as server:
        for path in paths:
            assert get(server, path, {}).status == 403
            assert get(server, path).headers["X-Jenkins"]
        server.hide(build.repository)
        assert get(server, f"{server_path(build)}/api/json").status == 404
        others = told(get(server, "/job/platform/api/json"))["jobs"]
        assert build.repository.name not in [job["name"] for job in others]
        assert told(get(server, "/whoAmI/api/json"))["name"] == "buildrelay"
        server.overall_read = False
        refused = get(server, "/api/json")
        assert (refused.status, b"Overall/Read" in refused.body) == (403, True)
        assert refused.headers["X-Jenkins"]


def test_a_server_that_ignores_trees_answers_whole_objects(clock):
    world, build = one_build(clock, "jenkins", "success")
    with JenkinsServer(world, port=None, honour_tree=False) as server:
        folder = json.loads(get(server, "/job/platform/api/json", tree="jobs[name]").body)
        job = next(job for job in folder["jobs"] if job["name"] == build.repository.name)
        assert [one["number"] for one in job["builds"]] == [build.number]
