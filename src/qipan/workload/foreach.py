"""`foreach`: the items of a batch task run one after another in its lease.  What is done is noted beside its checkpoints, so that
an attempt that follows goes on with the item that was interrupted."""

import shlex
from collections.abc import Sequence


def script(run: str, items: Sequence[str]) -> str:
    """A shell script that runs `run` with QIPAN_ITEM set to each item, and a checkpoint folder of its own.  An item that fails
    ends it with its exit code; a signal to stop ends it after the item that it reached."""
    words = " ".join(shlex.quote(item) for item in items)
    return f"""\
qipan_all="$QIPAN_CHECKPOINT_DIR" qipan_stopped= qipan_n=0
trap 'qipan_stopped=1' TERM
for QIPAN_ITEM in {words}; do
  qipan_n=$((qipan_n + 1))
  export QIPAN_ITEM QIPAN_CHECKPOINT_DIR="$qipan_all/item-$qipan_n"
  if [ ! -e "$qipan_all/done-$qipan_n" ]; then
    mkdir -p "$QIPAN_CHECKPOINT_DIR"
    (
trap - TERM
{run}
    ) || exit $?
    [ -z "$qipan_stopped" ] || exit 0
    : > "$qipan_all/done-$qipan_n"
  fi
  printf '{{"event": "progress", "step": %d, "steps": {len(items)}}}\\n{{"event": "checkpoint", "step": %d}}\\n' $qipan_n $qipan_n >> "$QIPAN_EVENTS"
done
"""
