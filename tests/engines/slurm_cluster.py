"""A real Slurm cluster on this machine: slurmctld and two slurmd, private munge, two partitions, devices that are files.
No systemd, no cgroups; everything below one folder, on loopback."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

CONF = """ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=600
KillWait=2
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
DefMemPerCPU=200
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.sock
AccountingStorageTRES=gres/gpu
"""
TOKENS = "AuthAltTypes=auth/jwt\nAuthAltParameters=jwt_key={folder}/jwt.key\n"
SLURMDBD = """AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


class SlurmCluster:
    """`nodes` x `devices` GRES devices of type gpu:sim.  `accounting`: with MariaDB and slurmdbd, so that sacct answers.  `rest`:
    with slurmrestd and JSON web tokens."""

    engine, resource = "slurm", "gpu:sim"

    def options(self) -> dict[str, str]:
        return {"conf": str(self.conf)}

    def __init__(
        self,
        folder: Path,
        name: str = "c0",
        nodes: int = 2,
        devices: int = 4,
        port: int = 16800,
        accounting: bool = False,
        rest: bool = False,
    ) -> None:
        self.accounting, self.rest = accounting, rest
        self.rest_conf: Path | None = None
        self.sql_data: Path | None = None
        self.folder, self.name, self.nodes, self.devices, self.port = folder, name, nodes, devices, port
        self.conf = folder / "slurm.conf"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def up(self, limit_s: float = 60.0) -> "SlurmCluster":
        folder, host = self.folder, os.uname().nodename.split(".")[0]
        for below in ("state", "dev"):
            (folder / below).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        key = folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
        lines, gres = [CONF.format(name=self.name, host=host, port=self.port, folder=folder)], []
        for index in range(self.devices):
            device = folder / "dev" / f"sim{index}"
            if not device.exists():
                os.mknod(
                    device, 0o600 | 0o020000, os.makedev(1, 3)
                )  # else Slurm sets no CUDA_VISIBLE_DEVICES
        for index in range(self.nodes):
            node = f"{self.name}n{index}"
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + 10 + index} CPUs=16"
                f" RealMemory=16000 Gres=gpu:sim:{self.devices} State=UNKNOWN\n"
            )
            gres.append(f"NodeName={node} Name=gpu Type=sim File={folder}/dev/sim[0-{self.devices - 1}]\n")
        if self.rest:
            (folder / "jwt.key").write_bytes(os.urandom(32))
            (folder / "jwt.key").chmod(0o600)
            lines[0] = lines[0].replace("StateSave", TOKENS.format(folder=folder) + "StateSave", 1)
        if self.accounting:
            gres_types = lines[0].rfind("GresTypes")
            more = ACCOUNTING.format(port=self.port + 50, folder=folder)
            lines[0] = lines[0][:gres_types] + more + lines[0][gres_types:]
        partitions = lines[0].rfind("PartitionName")
        self.conf.write_text(lines[0][:partitions] + "".join(lines[1:]) + lines[0][partitions:])
        (folder / "gres.conf").write_text("".join(gres))
        self.start("munged", "/usr/sbin/munged", "--foreground", "--force", f"--socket={folder}/munge.sock",
                   f"--key-file={key}", f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid",
                   f"--seed-file={folder}/munge.seed", "--num-threads=2")  # fmt: skip
        self._until(lambda: (folder / "munge.sock").exists(), 10, "munged")
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for index in range(self.nodes):
            self.start_node(index)
        self.until_nodes(limit_s)
        if self.rest:
            self.start_rest()
        return self

    def rest_options(self) -> dict[str, str]:
        """`engine_options` that ask slurmrestd in place of commands: without SLURM_CONF, munge is not reached either."""
        return {"rest": f"http://127.0.0.1:{self.port + 70}", "token_file": str(self.folder / "token")}

    def start_rest(self) -> None:
        """slurmrestd runs as nobody, which is refused nothing but this test's folders: it has its configuration elsewhere."""
        if self.rest_conf is None:
            self.rest_conf = Path(tempfile.mkdtemp(prefix="qipan-rest-"))
            self.rest_conf.chmod(0o755)
            shutil.copy(self.conf, self.rest_conf / "slurm.conf")
        conf = str(self.rest_conf / "slurm.conf")
        nobody = [
            "setpriv",
            "--reuid=nobody",
            "--regid=nogroup",
            "--clear-groups",
            "env",
            "SLURM_JWT=daemon",
            f"SLURM_CONF={conf}",
        ]
        serve = [
            "slurmrestd",
            "-f",
            conf,
            "-a",
            "rest_auth/jwt",
            "-s",
            "openapi/v0.0.38",
            f"127.0.0.1:{self.port + 70}",
        ]
        self.start("slurmrestd", *nobody, *serve)
        self._until(lambda: self._listens(self.port + 70), 30, "slurmrestd")
        self.new_token()

    def new_token(self) -> None:
        said = self.run("scontrol", "token", "lifespan=36000", "username=root").strip()
        (self.folder / "token").write_text(said.removeprefix("SLURM_JWT="))

    def _start_accounting(self) -> None:
        """A private MariaDB, and slurmdbd over it."""
        data, sql = (
            Path(tempfile.mkdtemp(prefix="qipan-sql-")),
            self.port + 60,
        )  # test folders are for root only
        self.sql_data = data
        shutil.chown(data, "mysql", "mysql")
        install = [
            "mariadb-install-db",
            "--no-defaults",
            "--user=mysql",
            f"--datadir={data}",
            "--skip-test-db",
        ]
        subprocess.run(
            [*install, "--auth-root-authentication-method=socket"], check=True, capture_output=True
        )
        door = data / "sql.sock"
        self.start("mariadbd", "/usr/sbin/mariadbd", "--no-defaults", "--user=mysql", f"--datadir={data}",
                   "--bind-address=127.0.0.1", f"--port={sql}", f"--socket={door}", "--innodb-buffer-pool-size=64M")  # fmt: skip
        grant = "create user slurm@'%' identified by 'slurm'; grant all on slurm_acct.* to slurm@'%'; flush privileges"
        ask = ["mariadb", "--no-defaults", f"--socket={door}", "-e"]
        self._until(
            lambda: subprocess.run([*ask, "select 1"], capture_output=True).returncode == 0, 60, "MariaDB"
        )
        subprocess.run([*ask, grant], check=True, capture_output=True)
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(SLURMDBD.format(folder=self.folder, port=self.port + 50, sql=sql))
        conf.chmod(0o600)
        self.start("slurmdbd", "/usr/sbin/slurmdbd", "-D")
        self._until(lambda: self._listens(self.port + 50), 60, "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", self.name)

    def _listens(self, port: int) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            return True

    def start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=self.environment(),
        )

    def start_controller(self) -> None:
        self.start("slurmctld", "/usr/sbin/slurmctld", "-D", "-f", str(self.conf))

    def until_saved(self) -> None:
        """The controller has written what it knows by now, some seconds later than it knows it: one that is killed before would give a
        job's number again."""
        began_s, state = time.time(), self.folder / "state" / "job_state"
        for job in self.run("squeue", "-h", "-o", "%i").split():
            self.run("scontrol", "update", f"jobid={job}", "comment=to be saved")
        self._until(lambda: state.stat().st_mtime > began_s, 60, "the saved state")

    def start_node(self, index: int) -> None:
        node = f"{self.name}n{index}"
        self.start(f"slurmd-{index}", "/usr/sbin/slurmd", "-D", "-N", node, "-f", str(self.conf))

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environment())
        return done.stdout

    def until_idle(self) -> None:
        """No job of anybody runs or waits, as the controller says."""
        self._until(self._idle, 60, "an idle cluster")

    def end_jobs(self) -> None:
        """All, also those that a controller has back which was killed and goes on from what it had saved some seconds earlier."""
        self._until(lambda: self._idle() or self.run("scancel", "--user=root"), 60, "an idle cluster")

    def _idle(self) -> bool:
        done = subprocess.run(["squeue", "-h"], capture_output=True, timeout=60, env=self.environment())
        return done.returncode == 0 and not done.stdout.strip()

    def until_nodes(self, limit_s: float = 60.0) -> None:
        """All nodes are idle, and answer: one that does not is `idle*`."""
        states = ("sinfo", "-h", "-N", "-o", "%T")
        self._until(lambda: self.run(*states).split().count("idle") >= self.nodes, limit_s, "nodes")

    def processes_of(self, hold: str) -> list[psutil.Process]:
        """Everything that runs below a job's supervisor, and its step daemon: what dies with a machine."""
        named = [
            one for one in psutil.process_iter(["cmdline"]) if hold in " ".join(one.info["cmdline"] or [])
        ]
        daemons = [above for one in named for above in one.parents() if "slurmstepd" in above.name()]
        return daemons + [below for one in named for below in [*one.children(recursive=True), one]]

    def down(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment(), capture_output=True, timeout=20)
        for name in sorted(self.processes, reverse=True):
            process = self.processes[name]
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder / "dev", ignore_errors=True)
        for elsewhere in (self.sql_data, self.rest_conf):
            if elsewhere is not None:
                shutil.rmtree(elsewhere)

    def _until(self, done, limit_s: float, what: str) -> None:
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            try:
                if done():
                    return
            except (OSError, subprocess.SubprocessError):
                pass  # not up yet
            time.sleep(0.1)
        raise AssertionError(f"{what} not up in {limit_s} s; see {self.folder}")
