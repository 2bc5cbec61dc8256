"""Simulated CI platforms and a strict subscriber, shared by `buildrelay demo` and the tests.

Nothing here uses BuildRelay's own reading of the platforms: it is the judge of it.  The only
import from the program is `webhook_app.signing`, since signatures need one definition.

* `facts`       what a build is at a moment, and its truth in BuildRelay's words
* `scripts`     how a build of a given kind goes, moment by moment
* `world`       a deterministic set of builds under one clock, and the truth about each; `busy_world`
* `httpd`       the small HTTP/1.1 server below all others
* `ci`          what the three API servers share: counts, faults, `answer(request)` without a socket
* `github`, `gitlab`, `jenkins`   the API servers; their parts (`github_files`, …) and `…_bodies` beside them
* `sender`      pushes signed webhooks, and loses, doubles and reorders a share of them
* `targets`     the webhooks that platforms send to; `blobs`: signed links to their stores
* `subscriber`  receives BuildRelay's webhooks and checks every one
* `judge`       holds BuildRelay's builds and the subscriber's record against the truth
"""
