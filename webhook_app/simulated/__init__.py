"""Simulated CI platforms and a strict subscriber, shared by `buildrelay demo` and the tests.

Nothing here uses BuildRelay's own reading of the platforms: it is the judge of it.  The only
import from the program is `webhook_app.signing`, since signatures need one definition.

* `facts`       what a build is at a moment, and its truth in BuildRelay's words
* `scripts`     how a build of a given kind goes, moment by moment
* `world`       a deterministic set of builds under one clock; `World.truth(build_id)`
* `httpd`       the small HTTP/1.1 server below all others
* `ci`          what the three API servers share: counts, faults, budget
* `github`, `gitlab`, `jenkins`   bodies of webhooks and REST answers, and the API servers
* `sender`      pushes signed webhooks, and loses, doubles and reorders a share of them
* `subscriber`  receives BuildRelay's webhooks and checks every one
* `judge`       holds BuildRelay's builds and the subscriber's record against the truth
"""
