"""Broken task files: one clear message each, with the place and what was probably meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qipan.errors import InvalidInput, NotFound
from qipan.workload.cards import CARDS
from qipan.workload.model import parameter_count
from qipan.workload.parse import ARCHITECTURE, KEYS, load_task, parse_task
from qipan.workload.site import load_site

GOOD = "kind: train\nname: a\nmodel: llama-3-8b\ndata: s3://b/c\nwork: {tokens: 1M, global_batch: 8192, seq: 4096}\n"
SCRIPT = "kind: train\nname: a\nrun: ./a.sh\n"
STAGES = "kind: train\nname: t\nstages: [{}]\n"
TRAINER = "{name: learn, kind: train, model: llama-3-8b, data: 'file:x', work: {tokens: 20, global_batch: 4, seq: 2}}"
FEEDER = "{name: prepare, run: x, feeds: learn, samples: 9}"
BROKEN = {
    "empty": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "not yaml": ("kind: [train\n", "is not YAML"),
    "a tab": ("kind: train\n\tname: a\n", "is not YAML"),
    "a list": ("- kind: train\n", "must be a mapping"),
    "plain text": ("train my model\n", "must be a mapping"),
    "no kind": ("name: a\n", "has no `kind`"),
    "no name": ("kind: train\n", "has no `name`"),
    "unknown key": (SCRIPT + "modle: x\n", "t.yaml:4:1: unknown key 'modle'; did you mean 'model'?"),
    "unknown kind": ("kind: trian\nname: a\n", "did you mean 'train'?"),
    "key twice": (SCRIPT + "name: b\n", "stands twice"),
    "our variable": (SCRIPT + "env: {A: b, QIPAN_AFTER: /keys}\n", "t.yaml:4:26: env.QIPAN_AFTER: names that begin with QIPAN_"),
    "empty value": (SCRIPT + "model:\n", "is empty"),
    "bad name": ("kind: train\nname: My Task!\nrun: x\n", "is no name"),
    "long name": (f"kind: train\nname: {'a' * 80}\nrun: x\n", "is no name"),
    "unknown card": (GOOD.replace("llama-3-8b", "lama-3-8b"), "did you mean 'llama-3-8b'?"),
    "card as list": (GOOD.replace("llama-3-8b", "[a]"), "must be plain text"),
    "no model": ("kind: train\nname: a\ndata: s3://b/c\nwork: {tokens: 1, global_batch: 1, seq: 1}\n", "needs `model`"),
    "no data": ("kind: train\nname: a\nmodel: llama-3-8b\nwork: {tokens: 1, global_batch: 1, seq: 1}\n", "needs `data`"),
    "no work": ("kind: train\nname: a\nmodel: llama-3-8b\ndata: s3://b/c\n", "needs `work`"),
    "no seq": (GOOD.replace(", seq: 4096", ""), "needs tokens, global_batch"),
    "rows not whole": (GOOD.replace("8192", "8191"), "is not a whole number of rows"),
    "fewer tokens than a batch": (GOOD.replace("1M", "100"), "less than one global_batch"),
    "count in words": (GOOD.replace("1M", "many"), "'many' is not a count"),
    "zero batch": (GOOD.replace("8192", "0"), "must be 1 or more"),
    "zero seq": (GOOD.replace("4096", "0"), "must be 1 or more"),
    "a model's file with a name too long": (GOOD.replace("llama-3-8b", "x" * 300 + ".json"), "cannot be read"),
    "a site": ("site: {board: {name: a}}\n", "qipan up --site FILE"),
    "a scenario": ("site: {board: {name: a}}\nscenario: {}\n", "qipan twin FILE"),
    "quota rules": ("quota: []\n", "qipan quota check FILE"),
    "negative count": (GOOD.replace("1M", "-5"), "is not a count"),
    "nan": (GOOD.replace("1M", ".nan"), "is not a count"),
    "bad source": (GOOD.replace("s3://b/c", "somewhere"), "is no source"),
    "work as text": (GOOD.replace("{tokens: 1M, global_batch: 8192, seq: 4096}", "long"), "must be a mapping"),
    "unknown work key": (GOOD.replace("tokens", "token"), "did you mean 'tokens'?"),
    "objective": (SCRIPT + "objective: speed\n", "is not one of cost, time, balanced"),
    "elastic": (SCRIPT + "elastic: maybe\n", "is not one of true, false"),
    "deadline": (SCRIPT + "limits: {deadline: tomorrow}\n", "is not a duration"),
    "deadline zero": (SCRIPT + "limits: {deadline: 0s}\n", "longer than nothing"),
    "money without currency": (SCRIPT + "limits: {max_cost: 100}\n", "is not an amount of money"),
    "money too fine": (SCRIPT + "limits: {max_cost: 0.0000001 CNY}\n", "finer than"),
    "unknown limit": (SCRIPT + "limits: {dedline: 3d}\n", "did you mean 'deadline'?"),
    "devices zero": (SCRIPT + "devices: 0\n", "whole number from 1"),
    "devices text": (SCRIPT + "devices: eight\n", "whole number from 1"),
    "devices max below min": (SCRIPT + "devices: {min: 4, max: 2}\n", "max 2 is below min 4"),
    "range without elastic": (SCRIPT + "devices: {min: 1, max: 2}\n", "needs `elastic: true`"),
    "checkpoint": (SCRIPT + "checkpoint: {every: often}\n", "is not a duration"),
    "profile": (SCRIPT + "profile: fast\n", "is not one of realtime"),
    "serve without slo": ("kind: serve\nname: a\nmodel: llama-3-8b\n", "needs `slo`"),
    "slo on train": (SCRIPT + "slo: {ttft: 1s}\n", "belongs to `kind: serve`"),
    "foreach on train": (SCRIPT + "foreach: [a]\n", "belongs to `kind: batch`"),
    "batch without run": ("kind: batch\nname: a\n", "needs `run`"),
    "partition": (SCRIPT + "on_partition: panic\n", "is not one of wait, restart"),
    "an alias": ("kind: train\nname: &n a\nrun: *n\n", "aliases"),
    "a bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nkind: train\n", "aliases"),
    "too deep": ("kind: " + "[" * 60 + "]" * 60, "nested deeper"),
    "too large": ("kind: train\nname: a\nrun: " + "x" * (1 << 20), "a file may have"),
    "model without layers": (GOOD.replace("llama-3-8b", "{hidden: 64, heads: 4, ffn_hidden: 128}"), "needs `layers`"),
    "heads": (GOOD.replace("llama-3-8b", "{layers: 2, hidden: 65, heads: 4, ffn_hidden: 128}"), "does not divide hidden"),
    "kv heads": (GOOD.replace("llama-3-8b", "{layers: 2, hidden: 64, heads: 4, kv_heads: 3, ffn_hidden: 1}"), "does not divide heads"),
    "zero layers": (GOOD.replace("llama-3-8b", "{layers: 0, hidden: 64, heads: 4, ffn_hidden: 1}"), "must be 1 or more"),
    "huge layers": (GOOD.replace("llama-3-8b", "{layers: 9T, hidden: 64, heads: 4, ffn_hidden: 1}"), "is no size"),
    "rate with a time's unit": (
        "kind: serve\nname: a\nslo: {ttft: 1s}\nload: {requests_per_s: 20m}\n", "not a number of requests per second"),
    "no such config": (GOOD.replace("llama-3-8b", "nowhere/config.json"), "no such config.json"),
    "env twice": (SCRIPT + "env: {A: 1, A: 2}\n", "key 'A' stands twice"),
    "devices in raised digits": (SCRIPT + "devices: \u00b2\n", "whole number from 1"),
    "half a character": ('kind: train\nname: a\nrun: "\\ud800"\n', "t.yaml:3:9: is not YAML: found invalid Unicode character"),
    "a bell": ("kind: train\nname: \x07\n", "is not YAML"),
    "deadline of ages": (SCRIPT + "limits: {deadline: 99999999w}\n", "longer than 100 years"),
    "two documents": (SCRIPT + "---\n" + SCRIPT, "is not YAML"),
    "stage name twice": (STAGES.format("{name: b, run: x}, {name: b, run: x, after: b}"), "stands twice"),
    "one stage": (STAGES.format("{name: a, run: x}"), "two or more stages"),
    "stages with a script of their own": ("run: x\n" + STAGES.format("{name: a, run: x}"), "belongs to one of the `stages`"),
    "stage without name": (STAGES.format("{run: x}, {name: b, run: x, after: b}"), "has no `name`"),
    "stage feeds a stranger": (STAGES.format(FEEDER + ", {name: lern, run: x}"), "no stage 'learn'; did you mean 'lern'?"),
    "stage after itself": (STAGES.format("{name: a, run: x, after: a}, {name: b, run: x, after: a}"), "names itself"),
    "stage alone": (STAGES.format(FEEDER + ", {name: learn, run: x}, {name: c, run: x}"), "c feeds nothing, is fed by nothing"),
    "stage feeds what": (STAGES.format("{name: a, run: x, feeds: b}, {name: b, run: x}"), "needs `run` and `samples`"),
    "samples for nobody": (STAGES.format("{name: a, run: x, samples: 3}, {name: b, run: x, after: a}"), "a feeds nothing"),
    "stages in a circle": (STAGES.format("{name: a, run: x, after: b}, {name: b, run: x, after: a}"), "a circle: b starts after a"),
    "streams in a circle": (
        STAGES.format("{name: a, run: x, feeds: b, samples: 1}, {name: b, run: x, feeds: a, samples: 1}"), "a circle: a feeds b feeds a"),
    "stage after its own feeder": (STAGES.format(FEEDER + ", {name: learn, run: x, after: prepare}"), "start together"),
    "stages in a circle through a stream": (
        STAGES.format(FEEDER + ", {name: learn, run: x, after: z}, {name: z, run: x, after: prepare}"), "a circle"),
    "rate of nothing": (STAGES.format(FEEDER.replace("9", "9, samples_per_s: 0") + ", {name: learn, run: x}"), "number of samples per second"),
    "too few rows for the built-in trainer": (
        STAGES.format(FEEDER + ", " + TRAINER), "9 are fewer than the 10 rows of seq 2 in work.tokens of learn"),
    "two feeders of the built-in trainer": (
        STAGES.format(FEEDER.replace("9", "10") + ", {name: more, run: x, feeds: learn, samples: 10}, " + TRAINER), "which one stage can feed"),
    "a stage that serves": (STAGES.format("{kind: serve, name: a, run: x}, {name: b, run: x, after: a}"), "is not one of train"),
    "control character": ("kind: train\nname: a\nrun: \"a\\0b\"\n", "zero byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_file_gets_one_clear_message(case):
    text, message = BROKEN[case]
    with pytest.raises(InvalidInput) as error:
        parse_task(text, "t.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("t.yaml")
    assert "\n" not in str(error.value)


def test_there_are_more_than_forty_broken_files():
    assert len(BROKEN) >= 40


#: the command, which leaves its own peak memory in kB (getrusage would count this process's from before the exec)
MEASURED = """
import sys
from pathlib import Path
from qipan.cli import main
peak = sys.argv.pop(1)
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    Path(peak).write_text(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unknown key", "a bomb", "too deep", "too large", "not yaml"])
def test_the_command_exits_2_soon_and_small_without_traceback(case, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(BROKEN[case][0])
    errors, peak = tmp_path / "stderr", tmp_path / "peak"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURED, str(peak), "submit", str(path)], stderr=file
        )
        _, status, used = os.wait4(process.pid, 0)
    text = errors.read_text()
    assert os.waitstatus_to_exitcode(status) == 2
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1
    assert used.ru_utime + used.ru_stime < 1.0
    assert int(peak.read_text()) < 200 * 1024


@pytest.mark.parametrize(
    "path",
    sorted(str(path) for path in Path("examples").glob("*.yaml") if "\nkind: " in "\n" + path.read_text()),
)
def test_every_example_of_a_task_reads(path):
    assert load_task(path).name


def test_a_missing_file_names_what_to_do():
    with pytest.raises(NotFound, match="name a task file"):
        load_task("nowhere.yaml")


def test_the_demo_site_has_three_levels_and_shares_within_the_cores():
    site = load_site("qipan.yaml")
    assert [board.board for board in site.root.walk()] == [
        "cn",
        "east",
        "shanghai",
        "west",
        "guizhou",
        "ningxia",
    ]
    assert sum(pool.cpu_share * pool.devices for pool in site.pools()) <= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site: {board: {name: a}}", "has no pool anywhere"),
        ("site: {board: {name: a, pools: [{chip: x, devices: 1, tariff: 1 CNY}]}}", "is no chip class"),
        ("site: {board: {name: a, pool: []}}", "did you mean 'pools'?"),
        (
            "site: {board: {name: a, children: [{name: a, pools: [{chip: v/m, devices: 1, tariff: 1 CNY}]}]}}",
            "stands twice",
        ),
        ("sites: {}", "did you mean 'site'?"),
    ],
)
def test_a_broken_site_file_is_refused(tmp_path, text, message):
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=message):
        load_site(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site: {board: {name: a, children: [{pools: []}]}}", "needs `name`"),
        (
            "site: {board: {name: a, pools: [{chip: v/m, devices: 1, tariff: 1 CNY, core_share: half}]}}",
            "such as 0.3",
        ),
        (
            "site: {lease: 0s, board: {name: a, pools: [{chip: v/m, devices: 1, tariff: 1 CNY}]}}",
            "longer than nothing",
        ),
        (
            "site: {tenants: [{name: t, balance: 1 CNY}, {name: t, balance: 1 CNY}],"
            " board: {name: a, pools: [{chip: v/m, devices: 1, tariff: 1 CNY}]}}",
            "tenant stands twice",
        ),
    ],
)
def test_a_site_file_with_a_wrong_value_is_refused_with_its_place(tmp_path, text, message):
    (tmp_path / "q.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=message) as error:
        load_site(tmp_path / "q.yaml")
    assert "q.yaml:1:" in str(error.value)


@pytest.mark.parametrize(
    ("card", "published"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_cards_have_the_published_number_of_weights(card, published):
    assert parameter_count(CARDS[card]) == pytest.approx(published, rel=1e-4)


LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def test_a_config_json_beside_the_task_file_is_read_as_the_card(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    (tmp_path / "t.yaml").write_text(GOOD.replace("llama-3-8b", "config.json"))
    model = load_task(tmp_path / "t.yaml").model
    assert parameter_count(model) == parameter_count(CARDS["llama-3-8b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2"}, "is not one of llama"),
        ({"hidden_size": None}, "hidden_size is 'None'"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_attention_heads": 33}, "does not divide hidden_size"),
    ],
)
def test_a_config_json_that_cannot_be_trusted_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG | change))
    with pytest.raises(InvalidInput, match=message):
        parse_task(GOOD.replace("llama-3-8b", "config.json"), "t.yaml", str(tmp_path))


def test_every_key_of_the_task_file_is_documented():
    page = Path("docs/task-file.md").read_text(encoding="utf-8")
    assert [key for key in KEYS + ARCHITECTURE if key not in page] == []
