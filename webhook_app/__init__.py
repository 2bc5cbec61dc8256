"""BuildRelay: CI webhooks in, one true state per build, signed webhooks out.

Where things are (the README has the long map):

* `lifecycle`, `progress`, `polling`, `signing`: pure rules
* `platforms/`: one pure file per CI platform
* `models`, `db`: tables, and the two ways to write
* `inbox.take` -> `builds.record` -> `deliveries.plan`: one webhook, one transaction
* `queries`: what the API reads
* `outbound`: the only door out
* `queues`: the bell that wakes `jobs`
* `web/`: the only files that import Flask
* `cli`, `supervisor`, `embedded`, `simulated/`: commands, `up`, `demo`
"""

VERSION = "0.1.0"
