"""A stream of samples from one stage of a task to another, while both run.

    feed(prepare)                       # the feeding stage: prepare(position) gives {"txt": ..., "png": ...} as bytes
    with fed("prepare") as stream:      # the fed stage
        for row in stream.rows(range(0, 32)): ...

The sample at a position is a function of the position alone (seed and epoch are the script's own), so whoever is killed goes on
by position, and nothing is lost or comes twice.  Samples travel in pieces: numbered tar files with a sidecar index
(`shards`), of one number of samples each, so a position names its piece.  A piece appears whole or not at all.  The feeder keeps
at most so many bytes ahead of what was read, and waits on a full disk.  The reader says from where on it would have to read again, were it started anew
(`saved`); what lies before is dropped, what lies after stays, so a feeder that made everything may end.
"""

from qipan.trainer.stream.attempt import output_of, say
from qipan.trainer.stream.feeder import feed
from qipan.trainer.stream.pieces import Prepare
from qipan.trainer.stream.reader import Fed, fed

__all__ = ["Fed", "Prepare", "fed", "feed", "output_of", "say"]
