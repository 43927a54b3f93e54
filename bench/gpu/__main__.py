"""`make gpu`: everything that only a machine with a GPU can tell, in one command of less than ten minutes.

    python bench/gpu                            # needs nothing installed but what the stages use: see docs/gpu.md
    python bench/gpu --quick --device cpu       # a dry run of everything that does not need a GPU

The files beside this one: suite.py (runs the stages and keeps what they find), a file for each stage, marks.py (what
must be reached), harness.py (what stages share), small_case.py (what compute-sanitizer watches).
"""

import sys

from suite import main

if __name__ == "__main__":
    sys.exit(main())
