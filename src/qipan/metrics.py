"""What a host measures, for Prometheus: read at each scrape from the state of its boards; durations are counted as they come.

Every label has few values: a board, a chip class, a state, the board at the other end of a link.  No task and no tenant is one,
unless `by_tenant` asks for balances."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from qipan.controller import Controller
from qipan.errors import InvalidInput
from qipan.events import DevicesBusy, Fact, LeaseRefused, TaskExited, TaskStarted
from qipan.hardware import BoardSpec
from qipan.host import Host
from qipan.leases import LAPSES, TaskId
from qipan.release import RELEASE
from qipan.scheduler import Decision, Phase, State

TICK_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 86_400.0, 7 * 86_400.0)
MICRO = 1e-6


class Metrics:
    """Of a host.  It counts from now on; `scrape` may be called from any thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._server: WSGIServer | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._tick_s = Histogram("qipan_tick_duration_seconds", "Time to decide and store one tick.", ["board"], buckets=TICK_S, registry=self._registry)  # fmt: skip
        self._wait_s = Histogram("qipan_task_wait_seconds", "From a task's submission to its first start.", buckets=WAIT_S, registry=self._registry)  # fmt: skip
        self._lapsed = Counter("qipan_leases_lapsed", "Leases that ended because nobody renewed them in time.", ["board"], registry=self._registry)  # fmt: skip
        self._exits = Counter("qipan_attempts_ended", "Attempts of tasks that ended, by how.", ["outcome"], registry=self._registry)  # fmt: skip
        #: (board, task) -> what share of the time its devices worked, as last measured
        self._worked: dict[tuple[str, str], float] = {}
        self._registry.register(_State(host, self._worked))
        for controller in host.tree.controllers.values():
            controller.on_tick = self._ticked

    def scrape(self, accept: str = "", by_tenant: bool = False) -> tuple[bytes, str]:
        """(text, its media type): OpenMetrics where `accept` asks for it."""
        encode, media = choose_encoder(accept)
        body: bytes = encode(self._registry)
        if by_tenant:
            more = CollectorRegistry(auto_describe=False)
            more.register(_Tenants(self._host))
            ends = b"# EOF\n"
            body = body.removesuffix(ends) + encode(more)
        return body, media

    def serve(self, address: str, port: int) -> int:
        """On an address of its own, without a token: for the network of the scraper alone.  Returns the port."""
        try:
            self._server, _ = start_http_server(port, address, self._registry)
        except OSError as error:
            raise InvalidInput(f"cannot serve metrics at {address}:{port} ({error}); give another --metrics") from None  # fmt: skip
        return int(self._server.server_address[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _ticked(self, controller: Controller, facts: Sequence[Fact], decision: Decision, now_s: float, took_s: float) -> None:  # fmt: skip
        self._tick_s.labels(controller.board).observe(took_s)
        lapsed = sum(isinstance(fact, TaskExited | LeaseRefused) and fact.why in LAPSES for fact in facts)
        lapsed += sum(reason.text in LAPSES for reason in decision.reasons)
        if lapsed:
            self._lapsed.labels(controller.board).inc(lapsed)
        for fact in facts:
            if isinstance(fact, DevicesBusy):
                self._worked[controller.board, fact.task_id] = fact.busy_share
            elif isinstance(fact, TaskExited):
                self._worked.pop((controller.board, fact.task_id), None)
        if controller is not self._host.tree.root:
            return
        for fact in facts:
            if isinstance(fact, TaskStarted) and fact.attempt == 1:
                task = controller.state.tasks.get(fact.task_id)
                if task is not None:
                    self._wait_s.observe(max(0.0, now_s - task.order.submitted_s))
            if isinstance(fact, TaskExited):
                self._exits.labels(fact.outcome).inc()


class _State:
    """What is so now."""

    def __init__(self, host: Host, worked: dict[tuple[str, str], float]) -> None:
        self._host, self._worked = host, worked

    def collect(self) -> Iterable[Metric]:
        with self._host.lock:
            yield InfoMetricFamily("qipan_build", "The release.", {"version": RELEASE})
            yield from self._devices()
            yield from self._tasks()
            yield from self._boards()
            yield from self._channels()
            yield from self._ledger()

    def _devices(self) -> Iterable[Metric]:
        devices = GaugeMetricFamily("qipan_devices", "Devices of a board's own pools: busy (a task runs), leased (about to start or stop), free, absent (not usable now).", labels=["board", "chip_class", "state"])  # fmt: skip
        ratio = GaugeMetricFamily("qipan_devices_busy_ratio", "Share of the usable devices that are busy.", labels=["board", "chip_class"])  # fmt: skip
        attempts = GaugeMetricFamily("qipan_attempts_running", "Attempts under supervisors of this host.", labels=["board"])  # fmt: skip
        for spec, controller in self._here():
            for pool in spec.pools:
                there = usable(controller.state, str(pool.chip_class))
                busy = held(controller.state, str(pool.chip_class), (Phase.RUNNING, Phase.RESIZING))
                leased = held(controller.state, str(pool.chip_class), tuple(Phase)) - busy
                counts = {"busy": busy, "leased": leased, "free": max(0, there - busy - leased), "absent": max(0, pool.devices - there)}  # fmt: skip
                for state, count in counts.items():
                    devices.add_metric([spec.board, pool.chip_class, state], count)
                if there:
                    ratio.add_metric([spec.board, pool.chip_class], busy / there)
        worked = GaugeMetricFamily("qipan_devices_worked_ratio", "Share of the time that the devices of running attempts worked, as last measured there.", labels=["board"])  # fmt: skip
        for spec, controller in self._here():
            shares = [
                (share, sum(need.devices for need in task.needs))
                for (board, task_id), share in sorted(self._worked.items())
                if board == spec.board and (task := controller.state.tasks.get(TaskId(task_id))) is not None
            ]
            devices_measured = sum(count for _, count in shares)
            if spec.pools and devices_measured:
                worked.add_metric(
                    [spec.board], sum(share * count for share, count in shares) / devices_measured
                )
        for board, engine in self._host.engines.items():
            attempts.add_metric([board], len(engine.running()))
        return (devices, ratio, worked, attempts)

    def _tasks(self) -> Iterable[Metric]:
        tasks = GaugeMetricFamily("qipan_tasks", "Live tasks of a board by state; of the top board, over ones too.", labels=["board", "state"])  # fmt: skip
        for spec, controller in self._here():
            counts = dict.fromkeys((str(phase) for phase in Phase), 0)
            for task in controller.state.tasks.values():
                counts[str(task.phase)] += 1
            if controller is self._host.tree.root:
                counts |= dict.fromkeys(("done", "failed", "cancelled"), 0)
                for how in controller.state.over.values():
                    counts[how] = counts.get(how, 0) + 1
            for state, count in sorted(counts.items()):
                tasks.add_metric([spec.board, state], count)
        return (tasks,)

    def _boards(self) -> Iterable[Metric]:
        facts = CounterMetricFamily("qipan_facts", "Facts that the board stored.", labels=["board"])
        size = GaugeMetricFamily("qipan_store_bytes", "Of the board's store on disk.", labels=["board"])
        lost = GaugeMetricFamily("qipan_engines_lost", "Engines and boards below that are silent.", labels=["board"])  # fmt: skip
        leads = GaugeMetricFamily("qipan_board_leads", "1 where this process decides for the board.", labels=["board"])  # fmt: skip
        for spec, controller in self._here():
            facts.add_metric([spec.board], controller.store.fact_count())
            if controller.store.path is not None:
                size.add_metric([spec.board], bytes_of(controller.store.path))
            lost.add_metric([spec.board], sum(engine.lost for engine in controller.state.engines.values()))
        leads.add_metric([self._host.site.root.board], float(self._host.leads()))
        return (facts, size, lost, leads)

    def _channels(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily("qipan_channel_unacknowledged_messages", "Messages to the other board that it has not taken yet.", labels=["board", "peer"])  # fmt: skip
        silence = GaugeMetricFamily("qipan_channel_silence_seconds", "Since anything came from the other board.", labels=["board", "peer"])  # fmt: skip
        up = GaugeMetricFamily("qipan_channel_connected", "1 while there is a connection.", labels=["board", "peer"])  # fmt: skip
        size = CounterMetricFamily("qipan_channel_bytes", "Frames sent and received, before TLS.", labels=["board", "peer", "direction"])  # fmt: skip
        dropped = CounterMetricFamily("qipan_channel_dropped_frames", "Frames that found no room or no connection; they are sent again.", labels=["board", "peer"])  # fmt: skip
        for board, peer, messages in self._host.tree.waiting():
            waiting.add_metric([board, peer], messages)
        for end in self._host.ends():
            labels = [self._host.site.root.board, end.peer]
            up.add_metric(labels, float(end.connected))
            if end.silent_s is not None:
                silence.add_metric(labels, end.silent_s)
            dropped.add_metric(labels, end.dropped)
            for direction, count in (("in", end.bytes_in), ("out", end.bytes_out)):
                size.add_metric([*labels, direction], count)
        return (waiting, silence, up, size, dropped)

    def _ledger(self) -> Iterable[Metric]:
        sums: dict[tuple[str, str], int] = {}
        for account, currency, balance in self._host.store.balances():
            kind = account.partition("/")[0]
            sums[kind, currency] = sums.get((kind, currency), 0) + balance
        money = GaugeMetricFamily("qipan_ledger_balance", "Sum of the accounts of a type, in units of the currency.", labels=["account_type", "currency"])  # fmt: skip
        for (kind, currency), balance in sorted(sums.items()):
            money.add_metric([kind, currency], balance * MICRO)
        return (money,)

    def _here(self) -> list[tuple[BoardSpec, Controller]]:
        controllers = self._host.tree.controllers
        return [(spec, controllers[spec.board]) for spec in self._host.site.root.walk() if spec.board in controllers]  # fmt: skip


class _Tenants:
    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterable[Metric]:
        money = GaugeMetricFamily("qipan_tenant_balance", "Of a tenant's account, in units of the currency.", labels=["tenant", "currency"])  # fmt: skip
        with self._host.lock:
            for account, currency, balance in self._host.store.balances():
                kind, _, tenant = account.partition("/")
                if kind == "tenant":
                    money.add_metric([tenant, currency], balance * MICRO)
        return (money,)


def usable(state: State, chip_class: str) -> int:
    """Devices that the board's own engines offer."""
    return sum(
        offer.devices
        for engine in state.engines.values()
        if not engine.lost and not engine.chooses
        for offer in engine.offers
        if offer.chip_class == chip_class
    )


def held(state: State, chip_class: str, phases: Sequence[Phase]) -> int:
    """Devices of the board's own engines that tasks hold in one of the phases."""
    own = {name for name, engine in state.engines.items() if not engine.chooses}
    return sum(
        need.devices
        for task in state.tasks.values()
        if task.engine in own and task.phase in phases
        for need in task.needs
        if need.chip_class == chip_class
    )


def bytes_of(path: Path) -> int:
    """Of a SQLite store with what it has not merged yet."""
    beside = (path, path.with_name(f"{path.name}-wal"))
    return sum(one.stat().st_size for one in beside if one.exists())
