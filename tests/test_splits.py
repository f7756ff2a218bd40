import pytest

from wireframe.errors import ConfigError, SampleError, ShardError
from wireframe.samples import iter_sample_rows, list_parquet, write_parquet
from wireframe.splits import dev_val_ids, iter_split_rows, read_exclusions, split_ids


def write(path, *ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet([{"order_id": order_id, "data": order_id.encode()} for order_id in ids], path)


def names(rows):
    return [row["order_id"] for row in rows]


@pytest.fixture
def hub_layout(tmp_path):
    """Two train shards, the first of three row groups, with the other splits beside them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "data/train-00001-of-00002.parquet", "f", "g")
    table = pyarrow.table({"order_id": list("abcde"), "data": [c.encode() for c in "abcde"]})
    parquet.write_table(table, tmp_path / "data/train-00000-of-00002.parquet", row_group_size=2)
    write(tmp_path / "data/validation-00000-of-00001.parquet", "v")
    write(tmp_path / "data/test-00000-of-00001.parquet", "t")
    return tmp_path


def test_splits_are_told_by_the_names_of_the_shards(hub_layout):
    assert names(iter_sample_rows(hub_layout, split="train")) == list("abcdefg")
    assert names(iter_sample_rows(hub_layout / "data", split="validation")) == ["v"]
    assert names(iter_sample_rows(hub_layout / "data/*.parquet", split="test")) == ["t"]
    assert names(iter_sample_rows(hub_layout)) == list("tabcdefgv")
    assert names(iter_sample_rows(hub_layout / "data/validation-00000-of-00001.parquet", split="validation")) == ["v"]


@pytest.mark.parametrize("train, other, split", [
    ("train/0.parquet", "validation/0.parquet", "validation"),
    ("default/train/0.parquet", "default/val/0.parquet", "validation"),
    ("rows-train.parquet", "rows_dev_1.parquet", "validation"),
    ("a/training-1.parquet", "b/eval-1.parquet", "test"),
    # The name of a shard goes before that of its folder.
    ("test/train-0.parquet", "train/test-0.parquet", "test"),
])  # fmt: skip
def test_folders_and_other_words_tell_the_split_too(tmp_path, train, other, split):
    # A folder above the source says nothing.
    source = tmp_path / "validation" / "set"
    write(source / train, "a")
    write(source / other, "b")
    assert names(iter_sample_rows(source, split="train")) == ["a"]
    assert names(iter_sample_rows(source, split=split)) == ["b"]


def test_a_glob_below_a_folder_keeps_the_words_behind_it(tmp_path):
    write(tmp_path / "train-0.parquet", "a")
    write(tmp_path / "validation-0.parquet", "b")
    assert names(iter_sample_rows(tmp_path / "t*-0.parquet", split="train")) == ["a"]
    assert names(iter_sample_rows(tmp_path / "train-*.parquet", split="train")) == ["a"]
    assert names(iter_sample_rows(tmp_path / "**/*.parquet", split="train")) == ["a"]


def test_without_any_word_every_shard_is_train(tmp_path):
    write(tmp_path / "synth-1-000000.parquet", "a")
    write(tmp_path / "trainval.parquet", "b")
    assert split_ids(tmp_path) == ["a", "b"]
    with pytest.raises(ShardError, match=r"no shard of the validation split in .*there: no named split"):
        list_parquet(tmp_path, "validation")


def test_validation_rows_are_not_taken_for_train_where_train_is_not_there(tmp_path):
    write(tmp_path / "validation-0.parquet", "a")
    write(tmp_path / "more.parquet", "b")
    with pytest.raises(ShardError, match=r"no shard of the train split .*there: no named split, validation"):
        list_parquet(tmp_path, "train")
    with pytest.raises(ShardError, match="no shard of the train split"):
        list_parquet(tmp_path / "validation-0.parquet", "train")
    with pytest.raises(ShardError, match="unknown split 'dev'; choose one of train, validation, test"):
        list_parquet(tmp_path, "dev")


def test_splits_of_a_data_set_on_the_hub(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = [f"datasets/o/test{at}/data/{name}-0.parquet" for at in ("", "@main") for name in ("train", "validation")]

    class Files:
        def isfile(self, path):
            return path.removeprefix("hf://") in files

        def glob(self, pattern):
            start = pattern.removeprefix("hf://").split("*")[0]
            return [path for path in files if path.startswith(start)]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    for at in ("", "@main"):
        source = f"hf://datasets/o/test{at}"
        expected = [f"{source}/data/train-0.parquet"]
        for form in ("", "/", "/data", "/data/train*", "/**/*.parquet", "/data/train-0.parquet"):
            assert list_parquet(source + form, "train") == expected, form


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 100])
def test_dev_val_is_the_last_rows_of_train(hub_layout, count):
    expected = list("abcdefg")[max(7 - count, 0) :]
    assert dev_val_ids(hub_layout, count) == expected
    rows = list(iter_split_rows(hub_layout, "dev-val", count))
    assert names(rows) == expected and [row["data"].decode() for row in rows] == expected


def test_other_splits_are_read_whole(hub_layout):
    assert names(iter_split_rows(hub_layout, "train", 3)) == list("abcdefg")
    assert names(iter_split_rows(hub_layout, "validation")) == ["v"]
    assert names(iter_split_rows(hub_layout, None)) == list("tabcdefgv")


def test_dev_val_opens_no_shard_it_does_not_need(hub_layout):
    (hub_layout / "data/train-00000-of-00002.parquet").write_bytes(b"not Parquet")
    assert dev_val_ids(hub_layout, 2) == ["f", "g"] == names(iter_split_rows(hub_layout, "dev-val", 2))
    with pytest.raises(ShardError, match="train-00000-of-00002"):
        dev_val_ids(hub_layout, 3)


def test_ids_that_are_no_text_are_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for wrong in ([1, 2], ["a", None]):
        parquet.write_table(pyarrow.table({"order_id": wrong, "data": [b"", b""]}), tmp_path / "a.parquet")
        with pytest.raises(SampleError, match=r"a\.parquet: order_id .* is no text"):
            split_ids(tmp_path)


def test_exclusions_are_one_id_a_line(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xef\xbb\xbfabc\r\n\r\n# a comment\n  d-1 # it is broken\n\t\nlast#1")
    assert read_exclusions(path) == {"abc", "d-1", "last#1"}
    path.write_bytes(b"")
    assert read_exclusions(path) == frozenset()


@pytest.mark.parametrize("content, message", [
    (b"a\xff\n", "not UTF-8"),
    (b"one\ntwo words\n", r"line 2: 'two words' is no scene id"),
    (b"a\x1b[2J\n", r"line 1: .*x1b.* is no scene id"),
    (b"a\0\n", "no scene id"),
    (b"a\rb\n", "no scene id"),
    (b"#" * ((16 << 20) + 1), "larger than 16 MiB"),
])  # fmt: skip
def test_what_is_no_list_of_ids_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as problem:
        read_exclusions(path)
    assert str(problem.value).isprintable()


def test_a_list_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the list of excluded scenes"):
            read_exclusions(path)
