"""`python -m lofi_fast.report RUN`."""

import sys

from lofi_fast.report import main

sys.exit(main())
