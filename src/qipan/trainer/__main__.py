"""One rank: `torchrun --nproc-per-node=N --max-restarts=0 -m qipan.trainer`."""

from qipan.trainer.loop import main

main()
