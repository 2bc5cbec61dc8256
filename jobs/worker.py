"""One worker process: RQ's non-forking worker on the queues it is given.

Non-forking, so that connections to subscribers and the database stay open between jobs and no
interpreter or import is paid per message.  A worker that dies is started again by its supervisor.
"""

import argparse
import logging
import time

from redis.exceptions import RedisError
from rq import SimpleWorker

from jobs import deliver, poll, sweep  # noqa: F401  imported before the first job needs them
from jobs.resources import resources
from webhook_app import queues

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0


def main() -> None:
    """Work until told to stop; wait for a Redis that is away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("queues", nargs="*", default=list(queues.JOBS), help="queues to serve")
    names = parser.parse_args().queues
    held = resources()
    logging.basicConfig(level=held.settings.log_level, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("rq").setLevel(logging.WARNING)
    while True:
        try:
            worker = SimpleWorker(names, connection=held.redis)
            worker.log_job_description = False
            worker.work(logging_level="WARNING", with_scheduler=False)
            return
        except RedisError as error:
            log.warning("redis does not answer, the worker waits: %s", error)
            time.sleep(WAIT_SECONDS)


if __name__ == "__main__":
    main()
