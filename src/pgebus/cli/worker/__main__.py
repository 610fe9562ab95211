"""`python -m pgebus.cli.worker <order>`: one of several worker processes, started by their supervisor alone."""

import sys

from pgebus import ConfigurationError, PgebusError
from pgebus.cli.messages import FAILED, MISUSED, fail
from pgebus.cli.worker.orders import Order
from pgebus.cli.worker.process import work

if __name__ == "__main__":
    try:
        sys.exit(work(Order.read(sys.argv[1])))
    except ConfigurationError as error:
        fail(str(error), MISUSED)
    except PgebusError as error:
        fail(str(error), FAILED)
