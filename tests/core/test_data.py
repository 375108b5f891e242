from __future__ import annotations

import copy
import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from supra_cli.core import corpus
from supra_cli.core import recipe as recipes
from supra_cli.core.data import packing, readers, rows, sources, tokenizer, tokens
from supra_cli.core.data import streamed as streaming
from supra_cli.core.data.streamed import Streamed
from supra_cli.core.errors import NotFoundError, SupraError, UsageError
from supra_cli.core.recipe import Data, Source

TEXTS = [f"document {number}: " + "alpha beta gamma " * (number + 1) for number in range(7)]


@pytest.fixture(scope="module")
def words():
    return tokenizer.train(TEXTS, 300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))


def write(folder: Path, name: str, texts: list[str] = TEXTS) -> Path:
    path = folder / name
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".jsonl.zst"):
        path.write_bytes(pyarrow.Codec("zstd").compress(lines, asbytes=True))
    elif name.endswith(".jsonl"):
        path.write_bytes(lines)
    else:
        path.write_text(texts[0], encoding="utf-8")
    return path


def read(path: Path | str, **settings) -> list[str]:
    return list(sources.texts(Source(path=str(path), **settings), "train", 0.0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, name)) == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.txt")) == [TEXTS[0]]


def test_a_long_text_file_comes_in_pieces_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PIECE_CHARACTERS", 100)
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "long.txt").write_text(text)
    pieces = read(tmp_path / "long.txt")
    assert len(pieces) > 5
    assert "".join(pieces) == text


def test_folders_and_globs_are_read_in_name_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    (tmp_path / "c" / "c").mkdir(parents=True)
    (tmp_path / "c" / "c" / "c.txt").write_text("c.txt")
    assert read(f"{tmp_path}/**/**/*.txt") == ["a.txt", "b.txt", "c.txt"]


def laid_out(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}), encoding="utf-8")
    return folder


def of_split(path: Path | str, default: str, **settings) -> list[str]:
    return [file.name for file in sources.files(Source(path=str(path), **settings), default).paths]


def test_a_folder_is_its_data_files_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    about = ("README.md", "README.txt", "LICENSE", "picture.png", "dataset_info.json")
    hidden = (".git/config", ".git/objects/a.json", ".cache/huggingface/b.jsonl", "sub/.hidden/c.txt", ".DS_Store")
    folder = laid_out(tmp_path / "corpus", "a.jsonl", "sub/b.json", "sub/c.ndjson.gz", "d.CSV", *about, *hidden)
    found = sources.files(Source(path=str(folder)), "train")
    assert [file.name for file in found.paths] == ["a.jsonl", "d.CSV", "b.json", "c.ndjson.gz"]
    assert found.remarks == [f"{folder}: 4 data files; 10 others are left out, such as LICENSE"]
    assert of_split(f"{folder}/**/*.md", "train") == ["README.md"]  # a glob means what it names
    with pytest.raises(NotFoundError, match=r"of a folder .* are read .* among the 3 in it, such as README.md"):
        sources.files(Source(path=str(laid_out(tmp_path / "other", "README.md", "code.py", ".git/config"))), "train")


def test_a_folder_has_the_folders_behind_its_links_each_once_however_they_lead(tmp_path: Path) -> None:
    elsewhere, folder = laid_out(tmp_path / "elsewhere", "b.jsonl"), laid_out(tmp_path / "corpus", "sub/a.jsonl")
    (elsewhere / "back").symlink_to(folder)
    for name, target in {"0": "sub", "1": elsewhere, "2": elsewhere, "round": ".", "itself": "itself"}.items():
        (folder / name).symlink_to(target)
    found = sources.files(Source(path=str(folder)), "train")
    assert [str(path.relative_to(folder)) for path in found.paths] == ["1/b.jsonl", "sub/a.jsonl"]
    assert found.remarks == []


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("train/a.jsonl", "val/b.jsonl", "test/c.jsonl"),
        ("my-train-00.jsonl", "my_dev_00.jsonl", "eval.jsonl"),
    ],
)
def test_a_folder_named_for_splits_is_read_by_split(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "corpus", *names)
    train, validation, test = (Path(name).name for name in names)
    assert of_split(folder, "train") == [train]
    assert of_split(folder, "validation") == [validation]
    assert of_split(folder, "train", split="valid") == [validation]
    assert of_split(folder, "train", split="test") == [test]
    assert of_split(f"{folder}/**/*.jsonl", "validation", split="train") == [train]
    assert len(of_split(f"{folder}/**/*.jsonl", "validation")) == 3
    with pytest.raises(NotFoundError, match="no split 'heldout': its files are named for test, train, validation"):
        of_split(folder, "train", split="heldout")


def test_a_split_that_selects_nothing_is_refused_and_files_of_no_split_are_read_whole(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "corpus", "a.jsonl", "b.jsonl")
    assert of_split(folder, "validation") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(NotFoundError, match="no split 'train': none of its files is named for a split"):
        of_split(folder, "train", split="train")
    with pytest.raises(UsageError, match="is one file, which has no split 'train'"):
        of_split(folder / "a.jsonl", "train", split="train")
    mixed = sources.files(Source(path=str(laid_out(folder, "validation.jsonl"))), "train")
    assert len(mixed.paths) == 3
    assert "set split to choose" in mixed.remarks[0]


def test_a_field_is_refused_where_text_has_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is plain text and has no field 'content'"):
        read(write(tmp_path, "a.txt"), text="content")


def test_a_tokenizer_cannot_be_trained_on_what_is_streamed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trained on text of this machine, and org/set is not on it"):
        list(sources.all_texts(Data(sources=[{"path": str(write(tmp_path, "a.jsonl"))}, {"path": "org/set"}])))


def test_a_tokenizer_is_trained_on_the_text_of_every_source_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    one, other = str(write(tmp_path, "a.jsonl", TEXTS[:3])), str(write(tmp_path / "sub", "a.jsonl", TEXTS[3:]))
    drawn = [{"path": one}, {"path": one, "repeat": "text"}, {"path": other, "repeat": "text"}]
    assert list(sources.all_texts(Data(sources=drawn))) == TEXTS
    assert list(sources.all_texts(Data(sources=drawn[2:]))) == TEXTS[3:]


def test_held_out_text_that_is_trained_on_is_said(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "sub" / "corpus", "train.jsonl", "validation.jsonl")
    file = folder / "train.jsonl"
    (tmp_path / "link.jsonl").symlink_to(file)

    def said(held_out: dict, **source) -> list[str]:
        source = {"path": str(folder)} | source
        return sources.overlap(Data(sources=[source], validation=[held_out]))

    assert said({"path": str(folder)}) == []
    assert said({"path": "python-stdlib"}, path="python-stdlib") == []
    assert said({"path": "org/set"}, path="org/set") == []
    for held_out in (file, tmp_path / "link.jsonl", f"{folder}/*.jsonl", f"{tmp_path}/**/train.jsonl"):
        assert "both held out and trained on" in said({"path": str(held_out)})[0]
    assert said({"path": "python-stdlib", "split": "train"}, path="python-stdlib")
    assert said({"path": "org/set"}, path="org/set", split="validation")


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        ("empty.jsonl", b"", SupraError, "no text"),
        ("empty.txt", b"", SupraError, "no text"),
        ("binary.txt", b"ab\0cd", SupraError, "looks binary"),
        ("latin.txt", "é".encode("latin-1"), SupraError, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', SupraError, "1 of 2 records"),
        ("numbers.jsonl", b'{"text": 3}\n', SupraError, "is int, expected text"),
        ("other.jsonl", b'{"txt": "a"}\n', SupraError, "did you mean 'txt'"),
        ("list.jsonl", b"[1]\n", SupraError, "is a JSON list, expected an object"),
        ("cut.parquet", b"PAR1", SupraError, "cannot read"),
        ("not.jsonl.gz", b"plain", SupraError, "cannot read"),
    ],
)
def test_bad_files_are_one_sentence(
    name: str, content: bytes, error: type[SupraError], told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        read(tmp_path / name)
    assert told in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_is_not_found_and_a_misspelt_built_in_source_has_a_near_miss(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no data at"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(NotFoundError, match="did you mean 'python-stdlib'"):
        sources.files(Source(path="python-stdlb"), "train")


def test_few_empty_records_are_skipped_and_many_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", ["", *TEXTS])
    assert list(sources.texts(Source(path=str(path)), "train", 0.2)) == TEXTS
    with pytest.raises(SupraError, match="1 of 8 records"):
        read(path)


def test_hub_names_are_told_from_paths() -> None:
    assert sources.is_on_hub(Source(path="allenai/c4"))
    assert sources.is_on_hub(Source(path="wikitext"))
    for path in ("python-stdlib", "data/text.jsonl", "missing.txt", "/abs/path", "*.txt", __file__):
        assert not sources.is_on_hub(Source(path=path)), path


def test_documents_open_and_close_as_the_tokenizer_does(words, tmp_path: Path) -> None:
    stored = tokens.tokenised(Source(path=str(write(tmp_path, "a.jsonl"))), words, "train", 0.0)
    starts = np.concatenate([[0], stored.ends[:-1]])
    assert (stored.ids[starts] == words.bos_token_id).all()
    assert (stored.ids[stored.ends - 1] == words.eos_token_id).all()
    assert words.decode(stored.ids[starts[2] : stored.ends[2]], skip_special_tokens=True) == TEXTS[2]


def test_the_cache_is_used_and_never_stale(words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl")
    source = Source(path=str(path))
    first = tokens.tokenised(source, words, "train", 0.0)
    monkeypatch.setattr(tokens, "encode", lambda *_: pytest.fail("tokenised again"))
    assert tokens.tokenised(source, words, "train", 0.0).digest == first.digest
    monkeypatch.undo()
    monkeypatch.setenv("SUPRA_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "a.jsonl", TEXTS[:3])
    assert len(tokens.tokenised(source, words, "train", 0.0).ends) == 3
    other = tokenizer.train(TEXTS[:2], 290)
    assert tokens.tokenised(source, other, "train", 0.0).digest != first.digest


def test_a_tokenizer_has_one_digest_before_and_after_it_encodes_and_another_where_its_tokens_are_others(words) -> None:
    """tokenizer.json may say how to cut and to pad, which the first text that is encoded without takes out."""
    cutting, splitting = copy.deepcopy(words), copy.deepcopy(words)
    cutting.backend_tokenizer.enable_truncation(4)
    cutting.backend_tokenizer.enable_padding()
    before = tokens.tokenizer_digest(cutting)
    assert len(next(tokens.encode(TEXTS, cutting))) > 4
    assert before == tokens.tokenizer_digest(cutting) == tokens.tokenizer_digest(words)
    splitting.split_special_tokens = True
    split, whole = (next(tokens.encode(["a</s>b"], one)) for one in (splitting, words))
    assert len(split) > len(whole)
    assert tokens.tokenizer_digest(splitting) != tokens.tokenizer_digest(words)


def data(tmp_path: Path, **settings) -> Data:
    path = str(write(tmp_path, "a.jsonl"))
    return Data(seq_len=24, sources=[{"path": path, "weight": 3.0}, {"path": path, "repeat": "text"}], **settings)


def test_rows_are_the_documents_in_pieces_with_positions_that_restart(words, tmp_path: Path) -> None:
    stored = tokens.tokenised(Source(path=str(write(tmp_path, "a.jsonl"))), words, "train", 0.0)
    stream = rows.Documents(stored, None)
    ids, positions = zip(*(stream.row(24) for _ in range(len(stored.ids) // 24)), strict=True)
    flat = np.concatenate(ids)
    assert (flat == stored.ids[: len(flat)]).all()
    restarts = np.concatenate(positions) == 0
    wanted = np.zeros(len(flat), bool)
    wanted[::24] = True
    wanted[[start for start in (0, *stored.ends[:-1]) if start < len(flat)]] = True
    assert (restarts == wanted).all()


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own(words, tmp_path: Path) -> None:
    stored = tokens.tokenised(Source(path=str(write(tmp_path, "a.jsonl"))), words, "train", 0.0)
    stream = rows.Documents(stored, (0, 0))
    epochs = [stream.row(len(stored.ids))[0] for _ in range(2)]
    assert not (epochs[0] == epochs[1]).all()
    assert (np.sort(epochs[0]) == np.sort(np.asarray(stored.ids))).all()


@pytest.mark.parametrize("packing", ["separate", "joined", "cut"])
def test_an_epoch_holds_every_row_once_and_those_of_a_long_document_are_apart(packing) -> None:
    """Two documents of a hundred rows each, and one that does not fill a row."""
    ends = np.array([800, 803, 1603])
    stream = rows.Documents(tokens.Tokens(np.arange(1603), ends, "numbers"), (0, 0), packing)
    count = stream.rows_in_an_epoch(8)
    assert count == {"cut": 201}.get(packing, 200)
    for epoch in range(2):
        drawn = np.stack([stream.row(8)[0] for _ in range(count)])
        assert stream.state == {"epoch": epoch + 1, "row": 0, "length": 8}
        seen = drawn[drawn > 0]
        assert len(np.unique(seen)) == len(seen) >= 1602 - 8
        long = drawn[(drawn[:, 0] >= 803) & (drawn[:, -1] > 0)]
        assert (np.diff(long, axis=1) == 1).mean() > 0.95
        assert (np.diff(long[:, 0]) == 8).mean() < 0.05


def test_rows_of_another_length_begin_an_epoch(words, tmp_path: Path) -> None:
    stored = tokens.tokenised(Source(path=str(write(tmp_path, "a.jsonl"))), words, "train", 0.0)
    stream, other = (rows.Documents(stored, (0, 0)) for _ in range(2))
    stream.row(24)
    first = stream.row(32)[0]
    assert stream.state == {"epoch": 1, "row": 1, "length": 32}
    other.state = {"epoch": 1, "row": 0, "length": 32}
    assert (other.row(32)[0] == first).all()


def test_a_position_that_an_older_supra_saved_is_named(words, tmp_path: Path) -> None:
    mixture = rows.training(data(tmp_path), words, 0)
    saved = mixture.state()
    saved["streams"][0] = {"epoch": 0, "document": 1, "offset": 3}
    with pytest.raises(SupraError, match=r"a\.jsonl\), or how supra reads it"):
        mixture.restore(saved)


def test_labels_are_the_next_token_of_the_same_document() -> None:
    ids = [np.arange(10, 18)]
    positions = [np.array([0, 1, 2, 0, 1, 0, 0, 1])]
    batch = rows.collate(ids, positions)
    assert batch.labels.tolist() == [[11, 12, -100, 14, -100, -100, 17, -100]]
    assert batch.targets == 4


def test_joined_rows_are_one_run_of_text(words, tmp_path: Path) -> None:
    mixture = rows.training(data(tmp_path, documents="joined"), words, 0)
    batch = mixture.batch(5, 24)
    assert (batch.position_ids == torch.arange(24)).all()
    assert batch.targets == 5 * 23


def test_sources_are_mixed_by_weight_at_every_moment(words, tmp_path: Path) -> None:
    mixture = rows.training(data(tmp_path), words, 0)
    for count in range(1, 40):
        mixture.batch(1, 24)
        drawn = [tokens // 24 for tokens in mixture.tokens_by_source().values()]
        assert sum(drawn) == count
        assert abs(drawn[0] - 0.75 * count) <= 1


@pytest.mark.parametrize("taken", [0, 1, 7, 50])
def test_a_restored_position_gives_the_rows_that_would_have_come(taken: int, words, tmp_path: Path) -> None:
    whole, again = (rows.training(data(tmp_path), words, 3) for _ in range(2))
    for _ in range(taken):
        whole.batch(1, 24)
    again.restore(json.loads(json.dumps(whole.state())))
    for _ in range(40):
        assert all(a.equal(b) for a, b in zip(whole.batch(2, 24), again.batch(2, 24), strict=True))


@pytest.mark.parametrize("vocabulary", [None, np.arange(7, 290)], ids=["text", "random"])
def test_repeats_hold_each_passage_twice(vocabulary, words, tmp_path: Path) -> None:
    stored = tokens.tokenised(Source(path=str(write(tmp_path, "a.jsonl"))), words, "train", 0.0)
    ids, positions = rows.Repeats(rows.Windows(stored), (0, 1), vocabulary=vocabulary).row(4000)
    starts = [*np.flatnonzero(positions == 0), 4000]
    for start, end in itertools.pairwise(starts[:-1]):
        piece = ids[start:end]
        assert any((piece[:length] == piece[-length:]).all() for length in range(8, len(piece) // 2 + 1))


def test_random_repeats_are_drawn_evenly_from_every_ordinary_token(words, tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl"))
    mixture = rows.training(Data(seq_len=24, sources=[{"path": path, "repeat": "random"}]), words, 0)
    ids = mixture.batch(64, 4000).input_ids
    counts = torch.bincount(ids.flatten(), minlength=len(words))
    ordinary = [n for n in range(len(words)) if n not in words.all_special_ids]
    assert counts[ordinary].min() > 0.5 * ids.numel() * 0.8 / len(ordinary)


def test_a_moved_text_is_the_same_and_another_one_is_named(words, tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()

    def mixture(folder: str, texts: list[str] = TEXTS) -> rows.Mixture:
        path = str(write(tmp_path / folder, "a.jsonl", texts))
        return rows.training(Data(seq_len=24, sources=[{"path": path}, {"path": path}]), words, 0)

    whole = mixture("here")
    whole.batch(3, 24)
    moved = mixture("there")
    moved.restore(json.loads(json.dumps(whole.state())))
    assert moved.batch(2, 24).input_ids.equal(whole.batch(2, 24).input_ids)
    with pytest.raises(SupraError, match=r"there/a.jsonl, .*there/a.jsonl#2\)"):
        mixture("there", TEXTS[:3]).restore(whole.state())
    one = rows.training(Data(seq_len=24, sources=[{"path": str(tmp_path / "here" / "a.jsonl")}]), words, 0)
    with pytest.raises(SupraError, match="the number of sources"):
        one.restore(whole.state())


def test_rows_longer_than_the_text_are_refused_before_any_is_drawn(words, tmp_path: Path) -> None:
    with pytest.raises(SupraError, match="fewer than one row of 100000"):
        rows.training(data(tmp_path), words, 0, longest=100_000)


def test_cut_rows_hold_one_piece_of_one_document_and_the_rest_carries_no_loss(words, tmp_path: Path) -> None:
    stored = tokens.tokenised(Source(path=str(write(tmp_path, "a.jsonl"))), words, "train", 0.0)
    stream = rows.Documents(stored, None, "cut")
    drawn = [stream.row(24) for _ in range(stream.rows_in_an_epoch(24))]
    assert stream.state == {"epoch": 1, "row": 0, "length": 24}
    batch = rows.collate(*map(list, zip(*drawn, strict=True)))
    documents = np.split(np.asarray(stored.ids), stored.ends[:-1])
    pieces = [document[start : start + 24] for document in documents for start in range(0, len(document), 24)]
    assert len(pieces) == len(drawn)
    for piece, ids, positions, labels in zip(pieces, *batch, strict=True):
        assert ids[: len(piece)].tolist() == piece.tolist()
        assert positions.tolist() == [*range(len(piece))] + [0] * (24 - len(piece))
        assert labels.tolist() == [*piece[1:]] + [packing.IGNORED] * (25 - len(piece))


def test_text_shorter_than_a_row_is_a_sentence(words, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(SupraError, match="fewer than one row of 512"):
        rows.training(Data(seq_len=512, sources=[{"path": str(tmp_path / "a.txt")}]), words, 0)


def test_text_shorter_than_a_row_fills_up_a_cut_one(words, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    recipe = Data(seq_len=512, documents="cut", sources=[{"path": str(tmp_path / "a.txt")}])
    (ids,) = tokens.encode(["short"], words)
    assert rows.training(recipe, words, 0).batch(1, 512).input_ids[0, : len(ids)].tolist() == ids


def test_held_out_rows_are_spread_evenly_and_the_same_every_time(words, tmp_path: Path) -> None:
    source = {"path": str(write(tmp_path, "a.jsonl"))}
    stored = tokens.tokenised(Source(**source), words, "train", 0.0)
    settings = data(tmp_path, validation=[source], validation_tokens=100)
    first, second = (rows.held_out(settings, words) for _ in range(2))
    assert first.input_ids.equal(second.input_ids)
    there = len(stored.ids) // 24
    got = first.input_ids.tolist()
    assert len(got) == 4
    assert got[0] == stored.ids[:24].tolist()
    assert got[-1] == stored.ids[24 * (there - 1) : 24 * there].tolist()


def test_held_out_text_shorter_than_a_row_is_a_sentence(words, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(SupraError, match="gives 0 rows of 24 tokens"):
        rows.held_out(data(tmp_path, validation=[{"path": str(tmp_path / "b.txt")}]), words)


def streamed(words, path: Path | str, **settings) -> Streamed:
    """The records of a local file as a dataset on the hub that has one commit."""

    def open_at(commit: str | None) -> tuple[datasets.IterableDataset, str]:
        return datasets.load_dataset("json", data_files=str(path), split="train", streaming=True), commit or "c0"

    return Streamed(open_at, Source(path="org/set", **settings), "train", words)


@pytest.mark.parametrize("taken", [0, 1, 5, 31])
def test_a_streamed_dataset_goes_on_exactly_where_it_was(taken: int, words, tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl"))

    whole, again = streamed(words, path), streamed(words, path)
    for _ in range(taken):
        whole.row(24)
    again.state = json.loads(json.dumps(whole.state))
    for _ in range(40):
        assert all((a == b).all() for a, b in zip(whole.row(24), again.row(24), strict=True))


def test_a_streamed_dataset_yields_its_documents_and_starts_over(words, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    stored = tokens.tokenised(Source(path=str(path)), words, "train", 0.0)
    ids, _ = streamed(words, path).row(2 * len(stored.ids))
    assert (ids == np.concatenate([stored.ids, stored.ids])).all()


class Hub:
    """A dataset on the hub whose commits are the files of a folder, by name."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.head, self._load = folder, "", datasets.load_dataset
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(streaming.datasets, "load_dataset", self.load)

    def push(self, commit: str, texts: list[str]) -> None:
        write(self.folder, f"{commit}.jsonl", texts)
        self.head = commit

    def dataset_info(self, path: str, revision: str | None) -> SimpleNamespace:
        commit = revision or self.head
        if not (self.folder / f"{commit}.jsonl").exists():
            request = SimpleNamespace(headers={}, status_code=404, request=None)
            raise huggingface_hub.errors.RevisionNotFoundError("404", response=request)
        return SimpleNamespace(sha=commit)

    def load(self, path: str, name: str | None, split: str, revision: str, streaming: bool):
        files = str(self.folder / f"{revision}.jsonl")
        return type(self)._read(self._load("json", data_files=files, split="train", streaming=streaming))

    @staticmethod
    def _read(dataset):
        return dataset


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub", monkeypatch)
    hub.push("c1", TEXTS)
    return hub


@pytest.mark.parametrize("taken", [0, 5])
def test_a_run_goes_on_with_the_commit_of_a_hub_dataset_that_it_was_started_with(taken: int, hub: Hub, words) -> None:
    recipe = Data(seq_len=24, sources=[{"path": "org/set"}])
    whole = rows.training(recipe, words, 0)
    for _ in range(taken):
        whole.batch(1, 24)
    saved = json.loads(json.dumps(whole.state()))
    hub.push("c2", ["other text altogether"] * 9)
    again = rows.training(recipe, words, 0)
    other = again.digests()
    again.restore(saved)
    assert again.digests() == whole.digests() != other
    for _ in range(40):
        assert all(a.equal(b) for a, b in zip(whole.batch(2, 24), again.batch(2, 24), strict=True))
    assert rows.training(recipe, words, 0).digests() == other  # a new run takes what is there now


@pytest.mark.parametrize("repeat", ["text", "random"])
@pytest.mark.parametrize("taken", [0, 5])
def test_repeats_of_a_hub_dataset_go_on_exactly_where_they_were(taken: int, repeat: str, hub: Hub, words) -> None:
    recipe = Data(seq_len=64, sources=[{"path": "org/set", "repeat": repeat}, {"path": "org/set"}])
    whole, again = rows.training(recipe, words, 0), rows.training(recipe, words, 0)
    for _ in range(taken):
        whole.batch(1, 64)
    again.restore(json.loads(json.dumps(whole.state())))
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(whole.batch(2, 64), again.batch(2, 64), strict=True))


def test_running_text_of_a_stream_is_its_rows_text(words, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    by_rows, by_pieces = streamed(words, path), streamed(words, path)
    sizes = [0, 3, 64, 128, 5]
    pieces = [by_pieces.text(np.random.default_rng(0), size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    assert (np.concatenate(pieces) == by_rows.row(sum(sizes))[0]).all()


@pytest.mark.parametrize("path", recipes.shipped().values(), ids=lambda path: path.stem)
def test_the_rows_of_every_shipped_recipe_can_be_drawn(path: Path, hub: Hub, words) -> None:
    recipe = recipes.load(path)
    longest = max(map(recipe.seq_len, recipe.stages))
    texts = [source.model_copy(update={"text": "text"}) for source in recipe.data.sources]
    mixture = rows.training(recipe.data.model_copy(update={"sources": texts}), words, recipe.seed, longest)
    assert mixture.batch(4, longest).input_ids.shape == (4, longest)


def test_another_tokenizer_or_a_commit_that_is_gone_is_a_sentence(hub: Hub, words) -> None:
    recipe = Data(seq_len=24, sources=[{"path": "org/set"}])
    saved = rows.training(recipe, words, 0).state()
    hub.push("c2", TEXTS)
    with pytest.raises(SupraError, match=r"the data changed .*org/set"):
        rows.training(recipe, tokenizer.train(TEXTS[:2], 290), 0).restore(saved)
    (hub.folder / "c1.jsonl").unlink()
    with pytest.raises(NotFoundError, match="org/set has no revision 'c1'"):
        rows.training(recipe, words, 0).restore(saved)


def test_held_out_rows_of_a_hub_dataset_come_once(hub: Hub, words) -> None:
    recipe = Data(seq_len=24, sources=[{"path": "org/set"}], validation=[{"path": "org/set"}], validation_tokens=24_000)
    held_out = rows.held_out(recipe, words).input_ids
    assert len(held_out) == sum(len(ids) for ids in tokens.encode(TEXTS, words)) // 24


def test_held_out_rows_of_a_hub_dataset_are_those_of_the_commit_that_is_kept(hub: Hub, words) -> None:
    recipe = Data(seq_len=24, sources=[{"path": "org/set"}], validation=[{"path": "org/set"}], validation_tokens=240)
    kept: dict[str, str] = {}
    began = rows.held_out(recipe, words, kept).input_ids
    assert kept == {"0": "c1"}
    hub.push("c2", ["other text altogether"] * 99)
    assert rows.held_out(recipe, words, json.loads(json.dumps(kept))).input_ids.equal(began)
    assert not rows.held_out(recipe, words).input_ids.equal(began)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([{"text": 5}], "field 'text' of dataset org/set is int, expected text"),
        ([{"text": ["a", "b"]}], "is list, expected text"),
        ([{"txt": "a"}], "has no field 'text'; did you mean 'txt'"),
        ([{"text": ""}, {"text": None}], "has no record with text in 'text'"),
    ],
)
def test_what_a_hub_dataset_says_wrong_is_a_sentence(records: list[dict], told: str, words, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(SupraError) as caught:
        streamed(words, path).row(24)
    assert told in str(caught.value)


def test_records_without_text_are_passed_over_in_a_stream(words, tmp_path: Path) -> None:
    holes = write(tmp_path, "holes.jsonl", ["", *itertools.chain(*([text, ""] for text in TEXTS))])
    whole, holed = streamed(words, write(tmp_path, "a.jsonl")), streamed(words, holes)
    for _ in range(60):
        assert (whole.row(24)[0] == holed.row(24)[0]).all()
        holed.state = json.loads(json.dumps(holed.state))


def test_a_stream_that_breaks_off_is_a_sentence(hub: Hub, words, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(dataset):
        def records():
            yield {"text": TEXTS[0]}
            raise ConnectionError("the server went away")

        return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(Hub, "_read", staticmethod(torn))
    stream = rows.training(Data(seq_len=24, sources=[{"path": "org/set"}]), words, 0)
    with pytest.raises(SupraError, match=r"org/set cannot be read on: .*went away; go on from the last checkpoint"):
        stream.batch(9, 24)


def test_the_standard_library_has_two_splits_that_do_not_meet() -> None:
    names = {split: {document.name for document in corpus.documents(split)} for split in ("train", "validation")}
    assert not names["train"] & names["validation"]
    assert len(names["train"]) > 10 * len(names["validation"]) > 100
    assert "json" in names["validation"]
    assert "pydoc_data.topics:async" in names["validation"]
    with pytest.raises(NotFoundError, match="no split"):
        next(sources.texts(Source(path="python-stdlib", split="tests"), "train", 0.0))


def test_a_tokenizer_knows_every_byte(words) -> None:
    text = "naïve ☃ \t\r\n\x00 日本"
    ids = words(text)["input_ids"]
    assert ids[0] == words.bos_token_id
    assert words.decode(ids[1:]) == text


def test_an_impossible_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        Data(sources=[{"path": "a", "weight": 0}])
