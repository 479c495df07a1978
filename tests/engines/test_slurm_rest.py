"""The Slurm engine over slurmrestd and JSON web tokens, on a real cluster; what its commands do is the measure."""

from dataclasses import replace

import pytest
from driven import CHIP, WAIT, Bench
from slurm_cluster import SlurmCluster

from qipan.engines.slurm import Slurm
from qipan.errors import QipanError
from qipan.events import LeaseRefused, TaskExited, TaskStarted

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = SlurmCluster(tmp_path_factory.mktemp("slurm"), "c8", port=17900, rest=True)
    try:
        yield running.up()
    finally:
        running.down()


@pytest.fixture
def bench(cluster, tmp_path, monkeypatch):
    """Its way to the cluster is slurmrestd alone: the commands would find no configuration."""
    cluster.until_idle()
    monkeypatch.setenv("SLURM_CONF", "/nonexistent")
    return Bench(cluster, tmp_path, options=cluster.rest_options())


def test_a_lease_is_a_job_that_holds_its_devices(bench, cluster):
    bench.start('echo "devices $CUDA_VISIBLE_DEVICES of $QIPAN_TASK_ID"; exit 3', devices=2)
    exited = bench.until(TaskExited)
    assert exited.outcome == "failed"
    assert "exit code 3" in exited.why
    assert "devices 0,1 of t" in bench.log()


def test_a_gang_over_two_nodes_holds_its_devices_on_both_and_is_resized(bench, cluster):
    bench.start(WAIT, devices=8)
    bench.until(TaskStarted)
    asked = cluster.run("squeue", "-h", "-o", "%D %C %b").split()
    assert asked == ["2", "2", "gres:gpu:sim:4"]
    bench.resize(2)
    assert bench.until(TaskExited).outcome == "resized"
    bench.until(TaskStarted)
    bench.stop(park=False)
    assert bench.until(TaskExited, outcome="cancelled")


def test_a_job_that_slurm_requeues_does_not_run_again(bench, cluster):
    """slurmrestd of 22.05 does not hear `requeue: false`."""
    bench.start(f"echo ran; {WAIT}")
    bench.until(TaskStarted)
    hold = bench.engine.journal.held["t"].hold
    job = cluster.run("squeue", "-h", "--name", hold, "-o", "%i").strip()
    cluster.run("scontrol", "requeue", job)
    assert bench.until(TaskExited, limit_s=60).outcome in ("parked", "lost")
    bench.poll_until(lambda: cluster.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING")
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")  # else after two minutes
    cluster.until_idle()
    assert bench.log().count("ran") == 1


def test_an_attempt_on_a_node_that_slurm_lost_is_ended_before_it_counts_as_lost(bench, cluster):
    """Its job is requeued and waits again, but what it ran goes on: the node is only cut off from Slurm."""
    bench.start(WAIT, lease_s=300)
    bench.until(TaskStarted)
    hold = bench.engine.journal.held["t"].hold
    node = cluster.run("squeue", "-h", "--name", hold, "-o", "%N").strip()
    cluster.kill(f"slurmd-{node[-1]}")
    try:
        exited = bench.until(TaskExited, limit_s=120)
        assert (exited.outcome, exited.why) == (
            "lost",
            "its queue lost it; it was ended by its own supervisor",
        )
        assert cluster.run("squeue", "-h", "--name", hold, "-o", "%T").strip() == "PENDING"
    finally:
        cluster.start_node(int(node[-1]))
        cluster.end_jobs()
        cluster.until_nodes()


def test_both_ways_see_the_same_nodes(bench, cluster):
    """A node that a waiting job is to have counts, one that failed, is reserved or drains does not."""
    ways = [
        Slurm(replace(bench.board, engine_options=one)) for one in (cluster.options(), cluster.rest_options())
    ]

    def seen(devices: int) -> bool:
        return [way.look("qipan").usable[CHIP] for way in ways] == [devices, devices]

    def state() -> str:
        return cluster.run("sinfo", "-h", "-N", "-n", "c8n1", "-o", "%T").strip()

    node = ("scontrol", "update", "nodename=c8n1")
    try:
        cluster.run(*node, "state=fail", "reason=test")
        bench.poll_until(lambda: state() == "fail" and seen(4))
        cluster.run(*node, "state=resume")
        bench.poll_until(lambda: seen(8))
        reserve = ("scontrol", "create", "reservation", "reservationname=r", "users=root", "nodes=c8n1")
        cluster.run(*reserve, "starttime=now", "duration=60")
        bench.poll_until(lambda: state() == "reserved" and seen(4))
        cluster.run("scontrol", "delete", "reservationname=r")
        bench.poll_until(lambda: seen(8))
        cluster.run("sbatch", "-N1", "-wc8n0", "--gres=gpu:sim:1", "-t5", "--wrap=sleep 60", "-o/dev/null")
        cluster.run(
            "sbatch", "-N2", "--gres=gpu:sim:4", "-t5", "--job-name=qipan-x", "--wrap=true", "-o/dev/null"
        )
        bench.poll_until(lambda: state() == "planned" and seen(7))
    finally:
        cluster.run("scontrol", "delete", "reservationname=r")
        cluster.run(*node, "state=resume")
        cluster.end_jobs()
        cluster.until_nodes()


def test_both_ways_see_the_same_cluster(bench, cluster):
    """The site's own jobs of several forms, one of Qipan's on a node that drains."""
    own = [
        ("-N1", "--gres=gpu:sim:1"), ("-N1", "--gpus=1"), ("-N2", "--gres=gpu:sim:4"), ("-N1", "-c", "3"),
        ("-N1", "--gres=gpu:sim:1", "--begin=now+1hour"),
    ]  # fmt: skip
    bench.start(WAIT)
    bench.until(TaskStarted)  # before the one of all devices waits, for which room would be kept
    jobs = [
        cluster.run("sbatch", "--parsable", *words, "--wrap=sleep 60", "-o/dev/null").strip() for words in own
    ]
    node = cluster.run("squeue", "-h", "--name", bench.engine.journal.held["t"].hold, "-o", "%N").strip()
    cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=fans and belts")
    try:
        by_commands = Slurm(replace(bench.board, engine_options=cluster.options()))
        by_rest = Slurm(replace(bench.board, engine_options=cluster.rest_options()))
        for prefix in ("qipan", "wrap"):
            bench.poll_until(lambda p=prefix: by_rest.look(p).jobs.keys() == by_commands.look(p).jobs.keys())
        seen, told = by_rest.look("qipan"), by_commands.look("qipan")
        assert (seen.usable, seen.draining, seen.out) == (told.usable, told.draining, told.out)
        assert [out.why for out in seen.out] == [f"Slurm drains {node} (fans and belts)"]
        assert bench.until(TaskExited).outcome == "parked"
    finally:
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        cluster.run("scancel", *jobs)
        cluster.until_nodes()


def test_what_slurm_refuses_is_the_leases_refusal(bench, cluster):
    bench.board = replace(
        bench.board, engine_options={**bench.board.engine_options, "account": "x", "time": "soon"}
    )
    bench.open()
    bench.reserve("true")
    assert "slurmrestd refused POST /job/submit" in bench.until(LeaseRefused).why


def test_what_is_wrong_with_slurmrestd_is_said_and_tasks_go_on(bench, cluster):
    bench.start("sleep 8; echo whole")
    bench.until(TaskStarted)
    slurm, token = Slurm(bench.board), cluster.folder / "token"
    good = token.read_text()
    token.write_text(good[:-6] + "AAAAAA")
    with pytest.raises(QipanError, match="slurmrestd"):
        slurm.look("qipan")
    token.write_text(good)
    cluster.kill("slurmrestd")
    try:
        with pytest.raises(QipanError, match="does not answer"):
            slurm.look("qipan")
        assert bench.until(TaskExited).outcome == "done"
        assert "whole" in bench.log()
    finally:
        cluster.start_rest()
    assert slurm.look("qipan").usable == {CHIP: 8}
