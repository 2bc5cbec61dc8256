"""What the tests of the simulated platforms share: secrets, credentials, and the end of a world."""

import base64

from webhook_app.simulated.sender import Secrets
from webhook_app.simulated.world import World

SIGNING_TOKEN = "whsec_" + base64.b64encode(b"simulated-signing-token!").decode()
SECRETS = Secrets(
    github="github-secret-of-the-tests", gitlab=SIGNING_TOKEN, jenkins="jenkins-secret-of-the-tests"
)

GITHUB = {"Authorization": "Bearer simulated-github-token", "User-Agent": "tests"}
GITLAB = {"PRIVATE-TOKEN": "simulated-gitlab-token"}
JENKINS = ("buildrelay", "simulated-jenkins-token")


def end_of(world: World) -> float:
    return world.ends_at - world.now() + 0.001
