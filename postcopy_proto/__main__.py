"""`python -m postcopy_proto` is `postcopy`."""

import sys

from postcopy_proto.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
