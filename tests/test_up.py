"""`buildrelay up` before its processes start: the data directory and the secrets in it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import hub as hubs
from webhook_app import settings, up
from webhook_app.up import CannotStart

NAMES = {
    "ENCRYPTION_KEYS", "ADMIN_TOKEN", "GITHUB_WEBHOOK_SECRET", "GITLAB_WEBHOOK_SECRET",
    "JENKINS_WEBHOOK_SECRET", "BUILD_EVENT_TOKEN",
}  # fmt: skip


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path


def test_secrets_are_made_once_and_only_the_owner_reads_them(data_dir):
    made = up.ensure_secrets(data_dir, {})
    assert set(made) == NAMES
    assert up.ensure_secrets(data_dir, {}) == up.read_secrets(data_dir) == made
    assert (data_dir / "secrets.env").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def elsewhere(tmp_path_factory):
    """Four secrets, each set in another way."""
    kept = tmp_path_factory.mktemp("kept")
    (kept / "admin").write_text("the content of a file")
    (kept / "config.yaml").write_text("github_webhook_secret: a value of the yaml\n")
    return {
        "ADMIN_TOKEN_FILE": str(kept / "admin"), "OM_BUILD_EVENT_TOKEN": "the value of an alias", "JENKINS_WEBHOOK_SECRET": "",
        "BUILDRELAY_CONFIG": str(kept / "config.yaml"), "GITLAB_WEBHOOK_SECRET": "of the environment",
    }  # fmt: skip


SET_ELSEWHERE = NAMES - {"ENCRYPTION_KEYS", "JENKINS_WEBHOOK_SECRET"}


def test_what_is_set_elsewhere_is_not_made(data_dir, elsewhere):
    assert set(up.ensure_secrets(data_dir, elsewhere)) == NAMES - SET_ELSEWHERE


def test_what_is_set_elsewhere_wins_over_what_was_made(data_dir, elsewhere):
    made = up.ensure_secrets(data_dir, {})
    values = settings.load(up.under(elsewhere, made))
    assert (values.admin_token, values.build_event_tokens) == (
        "the content of a file",
        ("the value of an alias",),
    )
    assert values.sources["github"].webhook_secrets == ("a value of the yaml",)
    assert values.sources["gitlab"].webhook_secrets == ("of the environment",)
    assert values.sources["jenkins"].webhook_secrets[0] == made["JENKINS_WEBHOOK_SECRET"]
    assert values.encryption_keys == (made["ENCRYPTION_KEYS"],)


def test_up_sets_only_what_nobody_set(data_dir, tmp_path_factory):
    config = tmp_path_factory.mktemp("kept") / "config.yaml"
    yaml = "redis_url: redis://r/1\nlog_level: debug\nallow_private_callbacks: false\ndatabase_url: postgres://d/x\n"
    config.write_text(yaml)
    environ = {"BUILDRELAY_CONFIG": str(config)}
    values = settings.load(up.environment(data_dir, "127.0.0.1", environ))
    assert (values.redis_url, values.log_level, values.allow_private_callbacks) == (
        "redis://r/1",
        "DEBUG",
        False,
    )
    assert values.web_concurrency == settings.load({}).web_concurrency
    values = settings.load(up.environment(data_dir, "127.0.0.1", {"LOG_LEVEL": ""}))
    assert values.redis_url == f"unix://{data_dir}/redis.sock"
    assert (values.log_level, values.web_concurrency, values.allow_private_callbacks) == ("WARNING", 1, True)
    assert not settings.load(up.environment(data_dir, "0.0.0.0", {})).allow_private_callbacks


def test_the_data_directory_may_be_named_by_the_yaml_file(tmp_path):
    (tmp_path / "config.yaml").write_text(f"buildrelay_data_dir: {tmp_path / 'there'}\n")
    environ = {"BUILDRELAY_CONFIG": str(tmp_path / "config.yaml")}
    assert settings.data_dir(environ) == tmp_path / "there"
    assert settings.data_dir(environ | {"BUILDRELAY_DATA_DIR": "/here"}) == Path("/here")


def test_all_processes_have_the_grace_of_the_settings():
    env = hubs.clean_environment({"STOP_GRACE_SECONDS": "25"})
    assert up.timing(settings.load(env)).stop_seconds == 25
    told = "from webhook_app import gunicorn_conf; print(gunicorn_conf.graceful_timeout)"
    made = subprocess.run(
        [sys.executable, "-c", told], env=env, capture_output=True, text=True, cwd=hubs.ROOT
    )
    assert (made.stdout, made.stderr) == ("25\n", "")


def test_redis_ends_after_those_that_need_it(data_dir):
    children = up.children({}, data_dir, "http://127.0.0.1:1", own_redis=True)
    assert [child.name for child in children if child.ends_last] == ["redis"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n# that was it\n"])
def test_what_a_person_wrote_there_stays_whole(data_dir, end):
    (data_dir / "secrets.env").write_bytes(f"# ours\nGITHUB_TOKEN=ghp_1\nADMIN_TOKEN=abc{end}".encode())
    made = up.ensure_secrets(data_dir, {})
    assert (made["ADMIN_TOKEN"], made["GITHUB_TOKEN"]) == ("abc", "ghp_1")
    assert set(made) == NAMES | {"GITHUB_TOKEN"}
    assert up.read_secrets(data_dir) == made
    assert (data_dir / "secrets.env").read_text().startswith("# ours\nGITHUB_TOKEN=ghp_1\nADMIN_TOKEN=abc\n")


def test_a_line_is_read_as_a_shell_reads_it(data_dir):
    lines = ["export A=1", 'B="two words"', "C='3'", " D = 4", "E=a=b", "#F=6", "G='", "H=", "nothing"]
    (data_dir / "secrets.env").write_text("\n".join(lines))
    assert up.read_secrets(data_dir) == {
        "A": "1", "B": "two words", "C": "3", "D": "4", "E": "a=b", "G": "'", "H": "",
    }  # fmt: skip


def test_of_several_first_starts_at_once_all_have_the_same_secrets(data_dir):
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: up.ensure_secrets(data_dir, {}), range(8))
    assert all(other == first for other in others)
    assert up.read_secrets(data_dir) == first


def test_secrets_that_can_not_be_kept_are_not_used(data_dir):
    (data_dir / "secrets.env").write_text("ADMIN_TOKEN=abc\n")
    (data_dir / "secrets.env.draft").mkdir()
    with pytest.raises(CannotStart, match=r"secrets\.env can't be written"):
        up.ensure_secrets(data_dir, {})
    assert up.read_secrets(data_dir) == {"ADMIN_TOKEN": "abc"}


def test_secrets_may_be_a_link_to_where_they_are_kept(data_dir, tmp_path_factory):
    kept = tmp_path_factory.mktemp("kept") / "own.env"
    (data_dir / "secrets.env").symlink_to(kept)
    made = up.ensure_secrets(data_dir, {})
    assert (data_dir / "secrets.env").is_symlink()
    assert f"ADMIN_TOKEN={made['ADMIN_TOKEN']}\n" in kept.read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("secrets.env", None, "secrets.env can't be read: "),
        ("secrets.env", b"\xff\xfe", "secrets.env can't be read: "),
        ("buildrelay.db", b"no database", "the database does not answer: file is not a database"),
        ("buildrelay.db", None, "the database does not answer: unable to open database file"),
        ("run", b"", "can't be used as data directory: File exists"),
        ("redis", b"", "redis can't be used: File exists"),
    ],
)
def test_a_data_directory_with_something_else_in_it_is_named_and_why(tmp_path, name, content, said):
    file = tmp_path / name
    file.mkdir() if content is None else file.write_bytes(content)
    env = hubs.clean_environment({"BUILDRELAY_DATA_DIR": str(tmp_path), "PORT": str(hubs.free_port())})
    command = [sys.executable, "-m", "webhook_app", "up"]
    made = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert made.returncode in (1, 2)
    assert said in made.stdout + made.stderr
    assert "Traceback" not in made.stdout + made.stderr


def test_the_banner_lists_every_source_with_its_webhook_url(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "sources:\n- {name: ghe, platform: github, webhook_secret: hush-hush-hush-hush}\n- {name: lab-2, platform: gitlab}\n"
    )
    values = settings.load({"BUILDRELAY_CONFIG": str(tmp_path / "config.yaml")})
    said = up.banner("http://127.0.0.1:8000", values, first=False, private=False)
    lines = [line.split() for line in said.splitlines() if line.startswith("  ")]
    assert lines == [
        ["github", "webhooks", "http://127.0.0.1:8000/webhooks/github", "secret:", "GITHUB_WEBHOOK_SECRET"],
        ["gitlab", "webhooks", "http://127.0.0.1:8000/webhooks/gitlab", "secret:", "GITLAB_WEBHOOK_SECRET"],
        ["jenkins", "webhooks", "http://127.0.0.1:8000/webhooks/jenkins", "secret:", "JENKINS_WEBHOOK_SECRET"],
        ["ghe", "webhooks", "(github)", "http://127.0.0.1:8000/webhooks/ghe", "secret:", "its", "webhook_secret"],
        ["lab-2", "webhooks", "(gitlab)", "http://127.0.0.1:8000/webhooks/lab-2",
         "secret:", "none:", "every", "push", "is", "refused"],
        ["build", "scripts", "http://127.0.0.1:8000/api/internal/build-events", "secret:", "BUILD_EVENT_TOKEN"],
        ["API", "http://127.0.0.1:8000/docs", "token:", "ADMIN_TOKEN"],
    ]  # fmt: skip
    assert "hush" not in said
