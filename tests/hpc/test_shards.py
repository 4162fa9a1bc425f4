"""The shard format, its writer and its readers, by breaking them."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc import parts, shards
from hpc.errors import UserError
from hpc.frames import MARK_MAGIC, Entry, encode_frame
from hpc.shards import (
    Limits,
    LostLease,
    ShardError,
    ShardWriter,
    join,
    part_path,
    read_errors,
    read_groups,
    read_rows,
    read_sidecar,
    repair,
    shard_path,
    sidecar_path,
    sidecars,
    verify,
    write_groups,
)

SMALL = Limits(keys=3, bytes=2000)
text = st.text(max_size=30)
keys = st.lists(st.text(st.characters(codec="utf-8"), max_size=20), unique=True, max_size=14)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
values = st.recursive(
    scalars.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
outcomes = st.lists(st.dictionaries(text, values, max_size=4), max_size=4) | text.filter(bool)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def lone(value):
    """What a value becomes when halves of surrogate pairs are no characters."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [lone(item) for item in value]
    if isinstance(value, dict):
        return {lone(name): lone(item) for name, item in value.items()}
    return value


def write(directory, outcomes_by_key, limits=SMALL, index=0, generation=0, order=None):
    writer = ShardWriter(directory, index, generation, limits=limits)
    for key, outcome in outcomes_by_key.items():
        failed = isinstance(outcome, str)
        writer.add(key, [] if failed else outcome, outcome if failed else "")
    return writer.commit(order)


def sample(directory, count=10, size=40):
    groups = {
        f"q:{n}": [{"n": n, "k": k, "text": os.urandom(size).hex()} for k in range(n % 4)]
        for n in range(count)
    }
    groups["q:bad"] = "no picture"
    write(directory, groups)
    return shard_path(directory, 0)


@quick
@given(names=keys, data=st.data())
def test_what_is_written_is_read(tmp_path_factory, names, data):
    directory = tmp_path_factory.mktemp("s")
    groups = {name: data.draw(outcomes) for name in names}
    sidecar = write(directory, groups)
    path = shard_path(directory, 0)
    failed = {name: reason for name, reason in groups.items() if isinstance(reason, str)}
    expected = [(name, [] if name in failed else lone(groups[name])) for name in names]
    assert list(read_groups(path)) == expected
    assert list(read_rows(directory)) == [row for _, rows in expected for row in rows]
    assert list(read_errors(directory)) == list(failed.items())
    assert (sidecar.inputs, sidecar.errors) == (len(names), len(failed))
    assert verify(path) == sidecar == sidecars(directory)[0]
    assert sidecar.bytes == path.stat().st_size


@quick
@given(names=keys, data=st.data())
def test_same_rows_same_bytes(tmp_path_factory, names, data):
    """In whatever order they come, wherever frames were cut, however often resumed."""
    directory = tmp_path_factory.mktemp("s")
    groups = {name: data.draw(outcomes) for name in names}
    straight = write(directory / "a", groups, order=names)
    writer, generation = ShardWriter(directory / "b", 0, limits=SMALL), 0
    for name in data.draw(st.permutations(names)):
        if data.draw(st.integers(0, 3)) == 0:
            writer.flush()
        if data.draw(st.integers(0, 4)) == 0:
            writer.flush()
            writer.abandon()
            resume = part_path(directory / "b", 0, generation)
            generation += 1
            writer = ShardWriter(directory / "b", 0, generation, resume, limits=SMALL)
        failed = isinstance(groups[name], str)
        writer.add(name, [] if failed else groups[name], groups[name] if failed else "")
    sidecar = writer.commit(names)
    assert sidecar.sha256 == straight.sha256
    assert sorted(path.name for path in (directory / "b").iterdir()) == [
        "00000.json",
        "00000.jsonl.zst",
    ]


def test_frames_cut_short_are_made_whole_at_the_commit(tmp_path):
    names = ["a", "b", "c", "d"]
    straight = write(tmp_path / "a", {name: [{}] for name in names}, order=names)
    writer = ShardWriter(tmp_path / "b", 0, limits=SMALL)
    for name in names:
        writer.add(name, [{}])
        writer.flush()
    assert writer.commit(names).sha256 == straight.sha256


def test_surrogates_nan_and_foreign_values(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.add("a", [{"text": "half \ud83d end", "pair": "\ud83d\ude00"}])
    for row in ({"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            writer.add("b", [row])
    with pytest.raises(ValueError, match="twice"):
        writer.add("a", [])
    with pytest.raises(ValueError, match="rows and an error"):
        writer.add("c", [{}], "failed")
    writer.add("b", [{"fine": True}])
    writer.commit()
    assert list(read_rows(tmp_path)) == [{"text": "half \ufffd end", "pair": "😀"}, {"fine": True}]


def test_every_flipped_bit_is_refused(tmp_path):
    path = sample(tmp_path, 5, 10)
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(broken))
        with pytest.raises(ShardError, match=rf"{path}.*byte \d+"):
            verify(path)


def test_every_truncation_is_refused_before_a_row(tmp_path):
    path = sample(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=rf"{path}.*byte \d+"):
            next(read_groups(path))
    path.write_bytes(whole + whole)
    with pytest.raises(ShardError):
        next(read_groups(path))


def test_cut_between_frames_names_the_byte(tmp_path):
    path = sample(tmp_path)
    with path.open("rb") as file:
        ends = [frame.end for frame in shards.read_frames(file, path)]
    assert len(ends) > 2
    path.write_bytes(path.read_bytes()[: ends[1]])
    assert subprocess.run(["zstd", "-tq", path]).returncode == 0, "only the sidecar knows"
    with pytest.raises(ShardError, match=f"byte {ends[1]}"):
        list(read_rows(tmp_path))


def test_rows_under_the_mark_of_others_are_refused(tmp_path):
    """Each pair of frames proves itself: a part has no sidecar that would tell."""
    one, other = (encode_frame([Entry(key, [row])]) for key, row in (("a", b"{}"), ("b", b"[]")))
    part = part_path(tmp_path, 0, 0)
    part.write_bytes(one[: one.index(MARK_MAGIC)] + other[other.index(MARK_MAGIC) :] + other)
    assert ShardWriter(tmp_path, 0, 1, part).done == {"b"}


def test_sidecar_missing_or_bad(tmp_path):
    path = sample(tmp_path)
    sidecar = sidecar_path(path)
    good = sidecar.read_text()
    for bad in (
        "",
        "{",
        "[]",
        "7",
        "null",
        '{"rows": 1}',
        good.replace("rows", "rowz"),
        good.replace(": ", ': "', 1).replace(", ", '", ', 1),
        good.replace("}", ', "sums": {"tokens": "many"}}'),
        good.replace("}", ', "sums": 3}'),
    ):
        sidecar.write_text(bad)
        with pytest.raises(ShardError, match="not a sidecar"):
            list(read_rows(tmp_path))
    sidecar.unlink()
    with pytest.raises(ShardError, match="sidecar is missing"):
        list(read_rows(tmp_path))
    sidecar.write_text(good)
    path.unlink()
    with pytest.raises(ShardError, match="no such shard"):
        list(read_rows(tmp_path))
    with pytest.raises(UserError, match="no shards"):
        list(read_rows(tmp_path / "nowhere"))


def test_sound_frames_under_a_foreign_sidecar(tmp_path):
    """Another shard of the very same size: only the digest tells."""
    path = sample(tmp_path / "a")
    changed = json.loads(sidecar_path(path).read_text())
    changed["sha256"] = "0" * 64
    sidecar_path(path).write_text(json.dumps(changed))
    with pytest.raises(ShardError, match="not the file"):
        verify(path)


def test_gap_is_refused(tmp_path):
    write_groups(tmp_path, ((f"k{n}", [{"n": n}]) for n in range(6)), per_shard=2)
    shard_path(tmp_path, 1).unlink()
    sidecar_path(shard_path(tmp_path, 1)).unlink()
    with pytest.raises(ShardError, match="00001"):
        list(read_rows(tmp_path))


def test_others_read_them(tmp_path):
    """zstd and datasets, also with keys that have no rows, and frames of nothing else."""
    groups = {f"q:{n}": [{"n": n, "text": "süß " * n}] for n in range(8)}
    groups |= {f"e:{n}": "failed" for n in range(6)} | {f"z:{n}": [] for n in range(6)}
    write(tmp_path, groups)
    write(tmp_path, {"only": "an error"}, index=1)
    write(tmp_path, {}, index=2)
    paths = [shard_path(tmp_path, index) for index in range(3)]
    assert subprocess.run(["zstd", "-tq", *paths]).returncode == 0
    shown = subprocess.run(["zstd", "-dcq", *paths], capture_output=True, check=True).stdout
    assert [json.loads(line) for line in shown.splitlines()] == list(read_rows(tmp_path))
    datasets = pytest.importorskip("datasets")
    for streaming in (False, True):
        loaded = datasets.load_dataset(
            "json",
            data_files=[str(path) for path in paths],
            split="train",
            cache_dir=str(tmp_path / "cache"),
            streaming=streaming,
        )
        assert [row["n"] for row in loaded] == list(range(8))


def test_resume_takes_whole_frames_only(tmp_path):
    writer = ShardWriter(tmp_path, 0, limits=SMALL)
    for n in range(7):
        writer.add(f"k{n}", [{"n": n}])
    writer.flush()
    writer.abandon()
    part = part_path(tmp_path, 0, 0)
    whole = part.read_bytes()
    for cut, expected in ((1, 6), (len(whole) - 1, 0), (0, 7)):
        part.write_bytes(whole[: len(whole) - cut])
        resumed = ShardWriter(tmp_path, 0, 1, part, limits=SMALL)
        assert len(resumed.done) == expected
        resumed.abandon()
        part_path(tmp_path, 0, 1).unlink()
    resumed = ShardWriter(tmp_path, 0, 1, part)
    resumed.add("k7", [{"n": 7}])
    resumed.commit()
    assert [row["n"] for row in read_rows(tmp_path)] == list(range(8))


def test_one_commit_wins(tmp_path):
    slow = ShardWriter(tmp_path, 0, 0)
    slow.add("a", [{"by": "slow"}])
    slow.flush()
    fast = ShardWriter(tmp_path, 0, 1, part_path(tmp_path, 0, 0))
    with pytest.raises(LostLease):
        ShardWriter(tmp_path, 0, 1)
    fast.add("b", [{"by": "fast"}])
    slow.add("b", [{"by": "slow"}])
    sidecar = fast.commit()
    with pytest.raises(LostLease):
        slow.commit()
    assert verify(shard_path(tmp_path, 0)) == sidecar
    assert [row["by"] for row in read_rows(tmp_path)] == ["slow", "fast"]


def test_slow_owner_may_win_then_the_robber_loses(tmp_path):
    slow = ShardWriter(tmp_path, 0, 0)
    robber = ShardWriter(tmp_path, 0, 1)
    slow.add("a", [{"by": "slow"}])
    robber.add("a", [{"by": "robber"}])
    slow.commit()
    with pytest.raises(LostLease):
        robber.commit()
    assert [row["by"] for row in read_rows(tmp_path)] == ["slow"]


def test_adopt(tmp_path):
    """A final file without a sidecar: whole, cut, and of other keys."""
    source = write(tmp_path / "in", {"a": [], "b": []})
    path = shard_path(tmp_path / "out", 0)
    made = write(tmp_path / "out", {"a": [{}], "b": "no"})
    whole = path.read_bytes()
    sidecar_path(path).unlink()
    adopted = shards.adopt(tmp_path / "out", 0, source, 1)
    assert adopted is not None and (adopted.sha256, adopted.rows) == (made.sha256, made.rows)
    assert verify(path) == adopted
    for damaged, left in ((whole[:-1], set()), (whole, {"a", "b"})):
        sidecar_path(path).unlink(missing_ok=True)
        path.write_bytes(damaged)
        other = write(tmp_path / "other", {"c": []}, generation=0)
        shards.clear(tmp_path / "other")
        assert shards.adopt(tmp_path / "out", 0, other if left else source, 1) is None
        assert not path.exists()
        writer = ShardWriter(tmp_path / "out", 0, 1, part_path(tmp_path / "out", 0, 0))
        assert writer.done == left
        writer.abandon()
        shards.clear(tmp_path / "out")


def test_what_is_counted_outlives_every_change_of_hands(tmp_path):
    rows = {
        "a": [{"tokens": 3, "text": "x"}, {"tokens": 4}],
        "b": [{"other": 5}, {"tokens": "none"}],
        "c": [{"tokens": 10}],
    }
    writer = ShardWriter(tmp_path, 0, limits=SMALL, counted=("tokens", "absent"))
    writer.add("c", rows["c"])
    writer.flush()
    writer.abandon()
    resume = part_path(tmp_path, 0, 0)
    writer = ShardWriter(tmp_path, 0, 1, resume, SMALL, ("tokens", "absent"))
    writer.add("a", rows["a"])
    writer.add("b", rows["b"])
    made = writer.commit(["a", "b", "c"])
    assert made.sums == {"tokens": 17, "absent": 0}
    assert sidecars(tmp_path)[0] == made == verify(shard_path(tmp_path, 0))
    sidecar_path(shard_path(tmp_path, 0)).unlink()
    assert shards.adopt(tmp_path, 0, made, 2, ("tokens",)).sums == {"tokens": 17}
    plain = write(tmp_path / "plain", rows)
    assert plain.sums == {}
    assert "sums" not in sidecar_path(shard_path(tmp_path / "plain", 0)).read_text()


def test_repair_keeps_frames_on_both_sides(tmp_path):
    path = sample(tmp_path / "s", 12)
    assert repair(path) == shards.Repair(path, False, 13, [])
    with path.open("rb") as file:
        frames = list(shards.read_frames(file, path))
    broken = bytearray(path.read_bytes())
    broken[frames[1].start + 20] ^= 1
    path.write_bytes(bytes(broken))
    found = repair(path)
    assert found.damaged and found.unnamed == 0 and found.aside.read_bytes() == bytes(broken)
    assert found.lost == sorted(entry.key for entry in frames[1].entries)
    assert found.kept == 13 - len(found.lost)
    assert not sidecar_path(path).exists() and not path.exists()
    writer = ShardWriter(path.parent, 0, 2, part_path(path.parent, 0, 1))
    assert writer.done.isdisjoint(found.lost) and len(writer.done) == found.kept


def test_repair_of_a_cut_shard_counts_or_names_the_lost(tmp_path):
    path = sample(tmp_path / "s", 12)
    write(tmp_path / "in", dict.fromkeys([f"q:{n}" for n in range(12)] + ["q:bad"], []))
    with path.open("rb") as file:
        frames = list(shards.read_frames(file, path))
    cut = path.read_bytes()[: frames[2].end]
    path.write_bytes(cut)
    sidecar = sidecar_path(path).read_text()
    lost = sorted(entry.key for frame in frames[3:] for entry in frame.entries)
    found = repair(path)
    assert (found.lost, found.unnamed, found.kept) == ([], len(lost), 13 - len(lost))
    path.write_bytes(cut)
    sidecar_path(path).write_text(sidecar)
    assert repair(path, shard_path(tmp_path / "in", 0)).lost == lost
    with pytest.raises(UserError, match="no such shard"):
        repair(path)


def test_write_groups_replaces_and_is_complete_last(tmp_path):
    assert write_groups(tmp_path, ((f"k{n}", [{"n": n}]) for n in range(10)), per_shard=4) == 3
    assert [sidecar.inputs for sidecar in sidecars(tmp_path).values()] == [4, 4, 2]

    def breaking():
        yield from ((f"k{n}", [{"n": -n}]) for n in range(5))
        assert sidecars(tmp_path) == {}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_groups(tmp_path, breaking(), per_shard=2)
    assert sidecars(tmp_path) == {}
    with pytest.raises(UserError, match="'k' comes twice"):
        write_groups(tmp_path, [("k", []), ("k", [])])
    assert write_groups(tmp_path, [("k", [{"n": 1}])]) == 1
    assert list(read_rows(tmp_path)) == [{"n": 1}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.json", "00000.jsonl.zst"]
    assert write_groups(tmp_path, []) == 0 and list(read_rows(tmp_path)) == []


@quick
@given(names=keys.filter(bool), data=st.data())
def test_join_is_by_key_in_the_first_ones_order(tmp_path_factory, names, data):
    run = tmp_path_factory.mktemp("run")
    folders = {role: run / "stages" / role / "shards" for role in ("questions", "paths", "scores")}
    rows = {}
    for role, folder in folders.items():
        groups = {name: data.draw(outcomes) for name in data.draw(st.permutations(names))}
        write(folder, groups)
        rows[role] = {k: [] if isinstance(v, str) else lone(v) for k, v in groups.items()}
    order = [key for key, _ in read_groups(shard_path(folders["questions"], 0))]
    assert list(join(folders)) == [
        (key, {role: rows[role][key] for role in folders}) for key in order
    ]


def test_join_names_the_stage_that_lacks_something(tmp_path):
    first, second = (tmp_path / "stages" / name / "shards" for name in ("questions", "paths"))
    write_groups(first, ((f"k{n}", []) for n in range(4)), per_shard=2)
    write_groups(second, ((f"k{n}", []) for n in range(2)), per_shard=2)
    roles = {"questions": first, "paths": second}
    with pytest.raises(UserError, match="stages/paths/shards/00001"):
        list(join(roles))
    write_groups(second, ((f"k{n}", []) for n in (0, 1, 2, 4)), per_shard=2)
    with pytest.raises(UserError, match="lacks key 'k3'.*remake stage paths"):
        list(join(roles))


def test_huge_rows_and_one_frame_in_memory(tmp_path):
    """120 MB of rows written and read by a process that may not hold half of them."""
    program = f"""
import resource, pathlib, sys
from hpc.shards import ShardWriter, read_rows, write_groups
folder = pathlib.Path({str(tmp_path)!r})
groups = ((f"k{{n}}", [{{"text": chr(97 + n % 26) * 1000000}}]) for n in range(120))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_groups(folder, groups, per_shard=120)
assert sum(len(row["text"]) for row in read_rows(folder)) == 120 * 1000000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The write fails half-way; with space again the same writer finishes."""
    writer = ShardWriter(tmp_path, 0, limits=SMALL)
    groups = {f"k{n}": [{"n": n, "text": "x" * 100}] for n in range(7)}
    real = os.write
    for n, (key, rows) in enumerate(groups.items()):
        if n == 5:

            def full(descriptor, data):
                if len(data) > 10:
                    return real(descriptor, data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "write", full)
            with pytest.raises(UserError, match="No space left.*free some space"):
                writer.add(key, rows)
            monkeypatch.setattr(os, "write", real)
        else:
            writer.add(key, rows)
    writer.commit()
    assert dict(read_groups(shard_path(tmp_path, 0))) == groups


def test_a_true_limit_of_the_kernel(tmp_path):
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_groups(tmp_path, ((str(n), [{"x": os.urandom(500).hex()}]) for n in range(99)))
        except UserError as error:
            os._exit(0 if "File too large" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sidecars(tmp_path) == {}


def test_unwritable_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "under", "/proc/none/such"):
        with pytest.raises(UserError) as caught:
            ShardWriter(type(tmp_path)(folder), 0)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_frames_close_by_bytes_keys_and_age(tmp_path, monkeypatch):
    path = part_path(tmp_path, 0, 0)
    writer = ShardWriter(tmp_path, 0, limits=Limits(keys=3, bytes=1000, seconds=5))
    writer.add("a", [{}])
    writer.add("b", [{}])
    assert path.stat().st_size == 0
    writer.add("c", [{}])
    by_keys = path.stat().st_size
    assert by_keys > 0
    writer.add("d", [{"x": "y" * 1000}])
    by_bytes = path.stat().st_size
    assert by_bytes > by_keys
    writer.add("e", [{}])
    writer.flush_if_old()
    assert path.stat().st_size == by_bytes
    now = parts.time.monotonic()
    monkeypatch.setattr(parts.time, "monotonic", lambda: now + 6)
    writer.flush_if_old()
    assert path.stat().st_size > by_bytes


def test_read_sidecar_of_nothing(tmp_path):
    with pytest.raises(ShardError, match="no such shard"):
        read_sidecar(shard_path(tmp_path, 3))


def test_shard_paths(tmp_path):
    stage = tmp_path / "stages" / "paths"
    write_groups(stage / "shards", ((f"k{n}", []) for n in range(4)), per_shard=2)
    expected = [shard_path(stage / "shards", index) for index in range(2)]
    assert shards.shard_paths(stage) == shards.shard_paths(stage / "shards") == expected
    assert shards.shard_paths(expected[0]) == expected[:1]
    assert [list(shards.cat(path)) for path in expected] == [[], []]
    with pytest.raises(UserError, match="no shards here"):
        shards.shard_paths(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json"])
def test_what_cannot_be_opened_is_named(suffix, tmp_path):
    write_groups(tmp_path, [("k", [{}])])
    path = tmp_path / f"00000{suffix}"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path}: cannot be read \(Is a directory\)"):
        verify(shard_path(tmp_path, 0))
