"""Put a rank on its device, then become the task: `python -S enter.py PYTHON ARGS...`.

`QIPAN_RANK_GROUPS` names one cgroup per device (may be empty); the pid is left in the attempt's folder, so that the
throttle finds it and a person can see which process is which rank.
"""

import os
import sys
from pathlib import Path

rank = int(os.environ.get("LOCAL_RANK", "0"))
groups = [group for group in os.environ.get("QIPAN_RANK_GROUPS", "").split(":") if group]
if groups:
    Path(groups[rank], "cgroup.procs").write_text(str(os.getpid()))
Path(os.environ["QIPAN_ATTEMPT_DIR"], f"rank-{rank}").write_text(str(os.getpid()))
os.execv(sys.argv[1], sys.argv[1:])
