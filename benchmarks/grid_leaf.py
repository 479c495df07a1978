"""A data centre whose devices are simulated, in a process of its own, for benchmarks.grid_tree: a task holds its devices for as long as it says
and nothing is started, so that what is measured is the boards.  python -m benchmarks.grid_leaf STORE DEVICES"""

import sys
import threading
import time
from pathlib import Path

from benchmarks.grid_tree import CHIP
from qipan.cli.run import Running
from qipan.clock import named_random
from qipan.engines import Engine
from qipan.engines.simulated import Behaviour, SimulatedEngine
from qipan.grid import GridHost
from qipan.hardware import BoardId, BoardSpec, Pool, PoolId
from qipan.host import LOOP_S
from qipan.identity import Wallet
from qipan.leases import AskStep, EngineId, Offer
from qipan.workload.site import Site


class SimulatedHost(GridHost):
    def _engine(self, board: BoardSpec) -> Engine:  # type: ignore[override]
        pool = board.pools[0]
        tariff = pool.tariff_micro_cny_per_device_hour
        offer = Offer(
            CHIP,
            pool.devices,
            (AskStep(pool.devices, tariff),),
            pool.devices,
            tariff,
            board.board,
            board.region,
        )
        name = EngineId(f"{board.board}-simulated")
        return SimulatedEngine(
            name, board.board, (offer,), self.clock, named_random(1, "leaf"), Behaviour(start_spread=0.0, speed_spread=0.0)
        )  # fmt: skip

    def run(self) -> None:
        """Its tasks end by time alone: it looks as often as a board that runs some."""

        def tick() -> None:
            while not self._stop.wait(LOOP_S):
                self._news.set()

        threading.Thread(target=tick, daemon=True).start()
        super().run()


def main() -> None:
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    name = BoardId(Wallet(folder / "identity", time.time).place[-1])
    pool = Pool(PoolId(f"{name}/{CHIP}"), name, CHIP, devices, devices, 1_000_000)
    site = Site(BoardSpec(name, region="cn-east", pools=(pool,)), lease_s=60.0)
    running = Running(site, folder, make_host=SimulatedHost)
    assert isinstance(running.host, SimulatedHost)
    running.host.dial()
    running.start()
    print("is served", flush=True)
    running.wait(threading.Event())


if __name__ == "__main__":
    main()
