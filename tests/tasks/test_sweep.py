"""A sweep without a run: its grid, the names of its members, its record, what it says first, and its table."""

import json
import re
from datetime import UTC, datetime

import pytest

from radlads.tasks.announce import Outlook
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import CodeVersion, Manifest, StoreRef
from radlads.tasks.contracts.locks.lease import run_lease
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.contracts.settings import check_run_name
from radlads.tasks.contracts.store.layout import product_key
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.pointers import point
from radlads.tasks.sweep.grid import make_members, member_name, parse_grid, short_keys
from radlads.tasks.sweep.outlook import describe_sweep
from radlads.tasks.sweep.record import check_record, keep_record, make_record, read_record
from radlads.tasks.sweep.table import keep_table, kept_failures, make_table

RATE, TOKENS = "distill.mixer_rate.start", "distill.tokens"


@pytest.fixture
def store(tmp_path):
    return open_store(StoreRef(uri=str(tmp_path / "store")))


def members_of(*options, overrides=None, recipe="smoke", **more):
    return make_members(recipe, parse_grid(options), overrides or {}, "first", **more)


def test_members_are_the_product_of_the_values():
    members = members_of(f"{RATE}=1e-5,3e-5", f"{TOKENS}=1e6,2e6", overrides={"finetune": None})
    assert [member.name for member in members] == [
        "first-mixer_rate.start_1e-05-tokens_1000000",
        "first-mixer_rate.start_1e-05-tokens_2000000",
        "first-mixer_rate.start_3e-05-tokens_1000000",
        "first-mixer_rate.start_3e-05-tokens_2000000",
    ]
    last = members[-1]
    assert last.values == {RATE: 3e-5, TOKENS: 2_000_000}
    assert load_recipe("smoke", last.overrides) == last.recipe
    assert (last.recipe.distill.mixer_rate.start, last.recipe.distill.tokens) == (3e-5, 2_000_000)
    assert last.recipe.finetune is None


def test_one_member_is_a_sweep_too():
    (member,) = members_of("student.attention_layers=[1, 3]")
    assert member.name == "first-attention_layers_1-3"
    assert member.recipe.student.attention_layers == (1, 3)


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        ({"align.tokens": 1, "distill.tokens": 2}, "align.tokens_1-distill.tokens_2"),
        ({"needle": None}, "needle_null"),
        ({"student.options.rope": True}, "options.rope_true"),
        ({"distill.seed": -0.1}, "seed_-0.1"),
        ({"a.b": 0.1234567891}, "b_0.1234567891"),
        ({"a.b": 1e20}, "b_1e20"),
        ({"student.variant": "rad_rwkv7"}, "variant_rad_rwkv7"),
        ({"a.b": "x/y"}, "b_x_y-[0-9a-f]{8}"),
        ({"a.b": []}, "b_empty-[0-9a-f]{8}"),
        ({"a.b": "y" * 200}, "b_y{24}-[0-9a-f]{8}"),
    ],
)
def test_names_of_members(values, ending):
    name = member_name("first", values, short_keys(dict.fromkeys(values, ())))
    assert re.fullmatch(f"first-{ending}", name)


def test_long_names_stay_names_of_runs():
    values = {f"section.{'key' * 20}{number}": number for number in range(3)}
    names = {member_name("s" * 100, values | {"section.last": last}, {k: k for k in [*values, "section.last"]})
             for last in range(3)}  # fmt: skip
    assert len(names) == 3
    for name in names:
        assert len(check_run_name(name)) == 128


@pytest.mark.parametrize(
    ("options", "overrides", "words"),
    [
        ([], {}, "a sweep needs at least one --grid KEY=VALUE,VALUE"),
        (["distill.tokens"], {}, "--grid distill.tokens: write it as KEY=VALUE,VALUE"),
        (["=1"], {}, "write it as KEY=VALUE,VALUE"),
        (["distill.tokens="], {}, "--grid distill.tokens: a value is missing"),
        (["distill.tokens=1e6,"], {}, "--grid distill.tokens: a value is missing"),
        (["distill.tokens=1e6,,2e6"], {}, "--grid distill.tokens=1e6,,2e6: not valid YAML: while parsing a flow node"),
        (["distill.tokens=1e6]"], {}, "--grid distill.tokens=1e6]: not valid YAML: "),
        (["distill.schedule={kind: cosine}"], {}, "is neither a single value nor a list of single values"),
        (["distill.tokens=1e6", "distill.tokens=2e6"], {}, "--grid distill.tokens is given twice"),
        (["distill.tokens=1e6,1000000"], {}, "--grid distill.tokens: the value 1000000 is listed twice"),
        (["align.tokens=1e6", "distill.tokens=5e5,1e6,5.0e+5"], {}, "the value 500000 is listed twice"),
        (["distill.tokenz=1,2"], {}, "distill.tokenz: unknown key 'tokenz'; did you mean 'tokens'?"),
        (["distil.tokens=1,2"], {}, "distil: unknown key 'distil'; did you mean 'distill'?"),
        (["distill.tokens=1e6,-1"], {}, "distill.tokens: Input should be greater than 0 (given: -1)"),
        (["distill.tokens=1e6"], {"distill.tokens": 5}, "'distill.tokens' is given by --grid and by --set"),
        (["finetune=null", "finetune.tokens=1e6"], {}, "--grid finetune replaces finetune.tokens"),
        (["distill.micro_batch=1,2"], {}, "--grid distill.micro_batch: it changes memory, speed"),
        (["resources.threads=1,2"], {}, "--grid resources.threads: it changes memory, speed"),
        (["teacher.path=demo,other"], {}, "--grid teacher.path: it names a place to read from"),
        (["teacher.revision=main,other"], {}, "--grid teacher.revision: it names a place to read from"),
        (["needle.haystack=[a.txt],[b.txt]"], {}, "--grid needle.haystack: it names a place to read from"),
        (["name=a,b"], {}, "--grid name: it describes the recipe and changes nothing"),
        ([f"distill.tokens={','.join(map(str, range(1, 66)))}"], {}, "has 65 members; a sweep of more than 64"),
    ],
)
def test_mistakes_in_a_grid_are_one_line(options, overrides, words):
    with pytest.raises(UserError) as error:
        members_of(*options, overrides=overrides)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_large_sweep_can_be_confirmed():
    assert len(members_of(f"{TOKENS}={','.join(str(n * 4096) for n in range(1, 66))}", most=None)) == 65


def test_a_record_is_written_once_and_gains_values(store, tmp_path):
    once = keep_record(store, "first", "smoke", members_of(f"{RATE}=1e-5,3e-5", f"{TOKENS}=1e6"))
    assert read_record(store, "first") == once
    assert once.grid == {RATE: [1e-5, 3e-5], TOKENS: [1_000_000]}
    assert once.members["first-mixer_rate.start_3e-05-tokens_1000000"] == {RATE: 3e-5, TOKENS: 1_000_000}
    assert once.asked.distill.mixer_rate.start == 1e-5
    make(store, tmp_path, once.recipe_of, "align")
    before = store.read("sweeps/first/sweep.yaml")
    same = members_of(f"{RATE}=1.0e-5,3e-5", f"{TOKENS}=1000000", overrides={"resources.threads": 1})
    assert keep_record(store, "first", "smoke", same) == once
    assert store.read("sweeps/first/sweep.yaml") == before
    more = keep_record(store, "first", "smoke", members_of(f"{RATE}=1e-4,1e-5,3e-5", f"{TOKENS}=1e6,2e6"))
    assert len(more.members) == 6
    assert set(once.members) < set(more.members), "those that were there keep their names"
    assert read_record(store, "first") == more


@pytest.mark.parametrize(
    ("options", "overrides", "words"),
    [
        ([f"{TOKENS}=1e6,2e6"], {}, f"is over {RATE} and {TOKENS}, not {TOKENS};"),
        ([f"{RATE}=1e-5", f"{TOKENS}=1e6"], {}, f"has {RATE}=1e-05,3e-05; values can be added, and 3e-05 is missing;"),
        ([f"{RATE}=1e-5,3e-5", f"{TOKENS}=1e6"], {"align.tokens": 65536}, "was made of a recipe with other settings;"),
    ],
)
def test_another_grid_of_the_same_name_is_refused(store, tmp_path, options, overrides, words):
    record = keep_record(store, "first", "smoke", members_of(f"{RATE}=1e-5,3e-5", f"{TOKENS}=1e6"))
    for name in record.members:
        make(store, tmp_path, name, "tokenize")
    before = store.read("sweeps/first/sweep.yaml")
    with pytest.raises(UserError) as error:
        keep_record(store, "first", "smoke", members_of(*options, overrides=overrides))
    assert words in str(error.value)
    assert "give another name with --run" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert store.read("sweeps/first/sweep.yaml") == before


def test_what_has_made_nothing_but_plans_does_not_use_up_the_name(store, tmp_path):
    wrong = keep_record(store, "first", "smoke", members_of(f"{RATE}=2e-5,3e-4", f"{TOKENS}=1e6,3e7"))
    for name in wrong.members:
        make(store, tmp_path, name, "plan", {})
    right = members_of(f"{TOKENS}=1e6,2e6", overrides={"align.tokens": 65536})
    check_record(store, "first", "smoke", right)
    assert read_record(store, "first") == wrong, "a check writes nothing"
    record = keep_record(store, "first", "smoke", right)
    assert record == make_record("smoke", right) == read_record(store, "first")


def test_values_without_products_can_be_dropped(store, tmp_path):
    """Also the one whose recipe is recorded; then another is, and compared from now on."""
    record = keep_record(store, "first", "smoke", members_of(f"{TOKENS}=1e7,2e6"))
    make(store, tmp_path, "first-tokens_2000000", "align")
    assert record.recipe_of == "first-tokens_10000000"
    with pytest.raises(UserError, match="was made of a recipe with other settings"):
        keep_record(store, "first", "smoke", members_of(f"{TOKENS}=1e6,2e6", overrides={"align.tokens": 65536}))
    record = keep_record(store, "first", "smoke", members_of(f"{TOKENS}=1e6,2e6"))
    assert record.grid == {TOKENS: [1_000_000, 2_000_000]}
    assert record.asked.distill.tokens == 1_000_000
    with pytest.raises(UserError, match=f"has {TOKENS}=2000000; values can be added, and 2000000 is missing"):
        keep_record(store, "first", "smoke", members_of(f"{TOKENS}=1e6"))


def test_a_member_at_work_keeps_its_values(store, tmp_path):
    """It may be at its plan, made by another sweep of the same name on another machine."""
    keep_record(store, "first", "smoke", members_of(f"{TOKENS}=1e6"))
    with run_lease(store, "first-tokens_1000000", tmp_path), pytest.raises(UserError, match="1000000 is missing"):
        keep_record(store, "first", "smoke", members_of(f"{TOKENS}=2e6"))


def test_there_is_no_such_sweep(store):
    with pytest.raises(UserError, match="there is no sweep 'first' in "):
        read_record(store, "first")


def ahead(label, product, what="new", **cost):
    return Outlook(label, what, product, **cost)


def test_the_announcement_counts_what_is_shared_once():
    align = ahead("align", "a", gpu_hours=8.0, dollars=16.0)
    found = {
        name: [ahead("plan", f"p{name}", "reused"), ahead("tokenize train", "t", "reused"), align,
               ahead("distill", f"d{name}", gpu_hours=2.0, dollars=4.0), *judged]
        for name, judged in (
            ("m1", [ahead("evaluate", "e1")]), ("m2", [ahead("evaluate", "e1")]), ("m3", [ahead("evaluate", "e3")]),
        )
    }  # fmt: skip
    found["m3"][3] = ahead("distill", "dm3", "continued", gpu_hours=1.0, dollars=2.0)
    assert describe_sweep(found) == [
        "tokenize train: one for all 3 members: reused",
        "align: one for all 3 members: new; about 8.0 GPU hours, 16.00 dollars",
        "distill: 3, one a member: 0 reused, 1 continued, 2 new; about 5.0 GPU hours, 10.00 dollars",
        "evaluate: 2 for 3 members: new",
        "in all: 3 members, 1 reused, 1 continued, 5 new; about 13.0 GPU hours, 26.00 dollars to go",
        "made one by one they would take about 16.0 GPU hours, 32.00 dollars more: "
        "members share what they ask for alike",
    ]


def make(store, tmp_path, run, stage, metrics=None, *, of=None, ending=None):
    """Have a run point at a product, which is there where it has metrics."""
    digest = f"{stage}{of or run}".encode().hex().ljust(64, "0")[:64]
    with run_lease(store, run, tmp_path) as lease:
        point(store, run, stage, stage, digest, lease)
    if metrics is not None and store.read_manifest(product_key(stage, digest)) is None:
        folder = tmp_path / digest
        folder.mkdir()
        (folder / "file").write_text("x")
        manifest = Manifest(stage=stage, digest=digest, spec={}, files=(), metrics=metrics, run=of or run,
                            code=CodeVersion(sha=None, versions={}), created_at=datetime.now(UTC))  # fmt: skip
        store.commit(product_key(stage, digest), folder, manifest)
    if ending is not None:
        store.put_bytes(f"{product_key(stage, digest)}/job/exit.json", json.dumps(ending).encode())


def test_the_table_marks_the_best_and_keeps_failures_as_rows(store, tmp_path):
    members = members_of(f"{TOKENS}=1e6,2e6,3e6,4e6,5e6")
    record = keep_record(store, "first", "smoke", members)
    one, two, three, four, five = record.members
    for name, kl, recall in ((one, 0.4, 0.9), (two, 0.3, 0.9)):
        make(store, tmp_path, name, "align", {"seconds": 3600.0}, of=one)
        make(store, tmp_path, name, "distill", {"seconds": 1800.0, "loss": 1.0})
        scores = {"kl": kl, "kl_stderr": 0.1, "kl/align": 0.1, "bits_per_byte_ratio": 1.5 - kl,
                  "student/arc|easy/acc": recall, "student/arc|easy/acc_stderr": 0.1, "student/bits_per_byte": 1.0,
                  "teacher/arc|easy/acc": 1.0, "student/lambada/perplexity": 10 * kl,
                  "nats_ratio/0.7": 1 + kl, "nats_ratio/0.7_stderr": 0.1,
                  "student/odd/thing": kl}  # fmt: skip
        make(store, tmp_path, name, "evaluate", scores)
        make(store, tmp_path, name, "needle", {"student/needle": 1 - kl})
        make(store, tmp_path, name, "publish", {})
    make(store, tmp_path, three, "distill", ending={"reason": "config", "message": "no\nluck | today"})
    make(store, tmp_path, four, "align", {"seconds": 1.0}, of=one)
    table = make_table(store, "first", record, {})
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.markdown().splitlines()]
    assert cells[0] == ["run", "tokens", "status", "KL", "bits per byte ratio", "nats ratio, 0.7", "arc\\|easy/acc",
                        "lambada/perplexity", "odd/thing", "needle", "hours"]  # fmt: skip
    assert cells[2] == [one, "1000000", "done", "0.4", "**1.1**", "1.4", "0.9", "4", "0.4", "0.6", "1.5"]
    assert cells[3] == [two, "2000000", "done", "**0.3**", "1.2", "**1.3**", "0.9", "**3**", "0.3", "**0.7**", "0.5"]
    assert cells[4] == [three, "3000000", "failed: distill: no luck \\| today", *[""] * 8]
    assert cells[5][2] == "unfinished"
    assert cells[6][:3] == [five, "5000000", "not started"]
    assert len({len(line) for line in table.markdown().splitlines()}) == 1, "aligned"
    keep_table(store, table)
    assert store.get_bytes("sweeps/first/table.md").decode() == f"# Sweep first\n\n{table.markdown()}\n"
    rows = {row["member"]: row for row in json.loads(store.get_bytes("sweeps/first/table.json"))["rows"]}
    assert rows[two]["best"] == ["KL", "nats ratio, 0.7", "lambada/perplexity", "needle"]
    assert rows[one]["values"] == {TOKENS: 1_000_000}
    assert kept_failures(store, "first") == {three: "distill: no luck | today"}
    store.put_bytes("sweeps/first/table.json", b'{"rows": 1}')
    assert kept_failures(store, "first") == {}
    failed = make_table(store, "first", record, {five: "refused", one: "an old story"}).rows
    assert [(row.status, row.reason) for row in (failed[0], failed[4])] == [("done", ""), ("failed", "refused")]


def test_without_judges_the_last_loss_is_the_score(store, tmp_path):
    record = keep_record(store, "first", "smoke", members_of(f"{TOKENS}=1e6,2e6"))
    for loss, name in enumerate(record.members, 1):
        make(store, tmp_path, name, "align", {"loss": 9.0})
        make(store, tmp_path, name, "distill", {"loss": float(loss)})
        make(store, tmp_path, name, "publish", {})
    table = make_table(store, "first", record, {})
    assert [row.scores for row in table.rows] == [{"distill loss": 1.0}, {"distill loss": 2.0}]
    assert table.best("distill loss") == 1.0
    make(store, tmp_path, next(iter(record.members)), "publish", of="a setting that changed")
    row = make_table(store, "first", record, {}).rows[0]
    assert (row.status, row.scores) == ("unfinished", {}), "a loss on the way is no result"
