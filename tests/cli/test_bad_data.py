"""Data that cannot be read ends in one sentence and a documented exit code, whichever verb meets it."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w

from supra_cli.core.data import sources

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n"
LINES = "".join(json.dumps({"text": TEXT}) + "\n" for _ in range(40)).encode()
NOISE = random.Random(0).randbytes(20_000).hex().encode()  # compresses badly, so that half a file is half its text
DEEP = b"[" * 100_000 + b"\n"
HALF = b'{"text": "\\ud800"}\n'  # half of a surrogate pair
COLUMNS = {"text": pyarrow.array([TEXT] * 40), "number": pyarrow.array(range(40))}

ARRAY = json.dumps([{"text": TEXT}] * 40, indent=1).encode()
TABLE = b"number,text\n" + b'1,"def read(self, size=-1):\n    return self.buffer[:size]"\n' * 40


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def parquet(**columns: pyarrow.Array) -> bytes:
    return written(pyarrow.table(columns))


def written(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def not_unicode() -> pyarrow.Array:
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")])


GOOD = {
    "a.txt": TEXT.encode() * 40,
    "a.jsonl": LINES,
    "a.json": LINES,
    "a.txt.gz": gzip.compress(NOISE),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.txt.bz2": bz2.compress(NOISE),
    "a.parquet": parquet(**COLUMNS),
    "b.json": ARRAY,
    "a.csv": TABLE,
}
BOM = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
GOOD_TOO = {
    "a mark before text": ("a.txt", BOM + GOOD["a.txt"]),
    "a mark before records": ("a.jsonl", BOM + LINES),
    "a mark before an array": ("a.json", BOM + ARRAY),
    "a mark before a table": ("a.csv", BOM + TABLE),
    "an array": ("a.json", ARRAY),
    "an array on one line": ("a.jsonl", json.dumps([{"text": TEXT}] * 40).encode()),
    "a compressed array": ("a.json.gz", gzip.compress(ARRAY)),
    "a table with commas": ("a.csv", TABLE),
    "a table with tabs": ("a.tsv", TABLE.replace(b"number,text", b"number\ttext").replace(b"1,", b"1\t")),
    "a compressed table": ("a.csv.zst", zstd(TABLE)),
    "a column of a dictionary": ("a.parquet", parquet(text=COLUMNS["text"].dictionary_encode())),
    "a column of large strings": ("a.parquet", parquet(text=COLUMNS["text"].cast(pyarrow.large_string()))),
    "gzip in pieces": ("a.jsonl.gz", gzip.compress(LINES) + gzip.compress(LINES)),
    "a suffix in capitals": ("A.JSONL", LINES),
}
BAD = {
    "empty": ("a.txt", b"", "holds no record"),
    "empty records": ("a.jsonl", b"\n  \n", "holds no record"),
    "empty and compressed": ("a.jsonl.gz", gzip.compress(b""), "holds no record"),
    "empty parquet": ("a.parquet", b"", "cannot read"),
    "binary": ("a.txt", bytes(range(256)), "looks binary"),
    "binary records": ("a.jsonl", bytes(range(256)), "is not JSON"),
    "Latin-1": ("a.txt", "é".encode("latin-1"), "is not UTF-8"),
    "Latin-1 records": ("a.jsonl", LINES.replace(b"size", b"\xe9"), "line 1 of a.jsonl is not UTF-8"),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), "is UTF-16; convert it"),
    "UTF-16 records": ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16; convert it"),
    "half a gzip": ("a.txt.gz", gzip.compress(NOISE)[:9000], "its gzip stream is cut off"),
    "half a zstd": ("a.txt.zst", zstd(NOISE)[:9000], "its zstd stream is cut off"),
    "half a bzip2": ("a.txt.bz2", bz2.compress(NOISE)[:9000], "its bz2 stream is cut off"),
    "a damaged gzip": ("a.txt.gz", gzip.compress(NOISE)[:500] + NOISE, "its gzip stream does not decompress"),
    "half a parquet": ("a.parquet", GOOD["a.parquet"][:-40], "cannot read"),
    "gzip in name": ("a.jsonl.gz", LINES, "its gzip stream does not decompress"),
    "zstd in name": ("a.jsonl.zst", LINES, "its zstd stream does not decompress"),
    "parquet in name": ("a.parquet", LINES, "cannot read"),
    "gzip without its suffix": ("a.jsonl", gzip.compress(LINES), "is compressed by gzip; give it the suffix .gz"),
    "zstd as gzip": ("a.jsonl.gz", zstd(LINES), "is compressed by zstd; give it the suffix .zst"),
    "parquet as records": ("a.json", GOOD["a.parquet"], "is parquet; give it the suffix .parquet"),
    "xz": ("a.jsonl.xz", b"\xfd7zXZ\0" + NOISE, "is compressed by xz, which is not read"),
    "zip": ("a.zip", b"PK\3\4" + NOISE, "is a zip archive; unpack it"),
    "tar": ("a.tar.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0"), "is a tar archive; unpack it"),
    "PDF": ("a.txt", b"%PDF-1.7\n" + NOISE, "is a PDF"),
    "a pointer for records": ("a.jsonl", POINTER, "git lfs pull"),
    "a pointer for text": ("a.txt", POINTER, "git lfs pull"),
    "a pointer for gzip": ("a.txt.gz", POINTER, "git lfs pull"),
    "a pointer for parquet": ("a.parquet", POINTER, "git lfs pull"),
    "a page for records": ("a.jsonl", PAGE, "is a web page"),
    "a page for parquet": ("a.parquet", PAGE, "is a web page"),
    "a page for gzip": ("a.jsonl.gz", PAGE, "is a web page"),
    "a page inside gzip": ("a.jsonl.gz", gzip.compress(PAGE), "is a web page"),
    "an answer of S3": ("a.json", b'<?xml version="1.0"?><Error/>', "is a web page"),
    "half an array": ("a.json", ARRAY[:-100], "begins as a JSON array and is none"),
    "an array with a number": ("a.json", b'[{"text": "a"}, 5]', "record 2 of"),
    "an object over lines": ("a.json", json.dumps({"text": TEXT}, indent=1).encode(), "objects over several lines"),
    "an object of records": ("a.json", json.dumps({"data": [{"text": TEXT}]}).encode(), "known: data"),
    "a table without the column": (
        "a.csv",
        TABLE.replace(b",text", b",txt"),
        "no column 'text' in its first line; did",
    ),
    "a table with two of the column": ("a.csv", TABLE.replace(b"number", b"text"), "has 2 columns 'text' in its first"),
    "a table whose first quote is open": ("a.csv", b'number,"text\n' + NOISE * 9, "does not name columns"),
    "a table of one long line": ("a.csv", NOISE * 9, "does not name columns"),
    "a torn table": ("a.csv", TABLE + b"1,2,3\n", "Expected 2 columns, got 3"),
    "a torn and compressed table": ("a.csv.gz", gzip.compress(TABLE + b"1,2,3\n"), "Expected 2 columns, got 3"),
    "compressed parquet": ("a.parquet.gz", gzip.compress(GOOD["a.parquet"]), "is parquet compressed once more"),
    "too many broken lines": ("a.jsonl", LINES + b"{\n", "1 of 41 records"),
    "too many empty records": ("a.jsonl", LINES + b'{"text": ""}\n', "record 41 is empty"),
    "nothing but nesting": ("a.jsonl", DEEP, "is not JSON"),
    "no Unicode": ("a.jsonl", HALF, "is no Unicode text"),
    "no Unicode in a column": ("a.parquet", parquet(text=not_unicode()), "column 'text' of"),
    "lists": ("a.jsonl", b"[1, 2]\n", "is a JSON list, expected an object with the field 'text'"),
    "numbers": ("a.jsonl", b"5\n", "is a JSON int, expected an object with the field 'text'"),
    "another field": ("a.jsonl", LINES.replace(b"text", b"txt"), "did you mean 'txt'"),
    "another column": ("a.parquet", parquet(number=COLUMNS["number"]), "has no column 'text'; known: number"),
    "two columns": (
        "a.parquet",
        written(pyarrow.table([COLUMNS["text"]] * 2, names=["text", "text"])),
        "has 2 columns 'text'; rename all but one",
    ),
    "a field of numbers": ("a.jsonl", b'{"text": 5}\n', "is int, expected text"),
    "a column of numbers": ("a.parquet", parquet(text=COLUMNS["number"]), "is int64, expected text"),
    "a column of lists": (
        "a.parquet",
        parquet(text=pyarrow.array([[TEXT]])),
        "is list<element: string>, expected text",
    ),
    "a column of records": ("a.parquet", parquet(text=pyarrow.array([{"en": TEXT}])), "is struct<en: string>,"),
    "short": ("a.txt", b"a", "fewer than one row"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SUPRA_CACHE", str(folder))
    return folder


@pytest.fixture
def recipe(base: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("recipe")

    def write(path: Path | str, **data) -> Path:
        stage = {"kind": "finetune", "tokens": 128, "batch_tokens": 64, "lr": 1e-3}
        data = {"seq_len": 32, "sources": [{"path": str(path)}], **data}
        file = folder / "recipe.toml"
        file.write_text(tomli_w.dumps({"base": str(base), "data": data, "stages": [stage]}))
        return file

    return write


@pytest.fixture
def both(supra, recipe, tmp_path_factory):
    """What `data peek` and `uptrain` say about a path; the run that is not started is not there either."""

    def run(path: Path | str, **data):
        output = tmp_path_factory.mktemp("runs") / "run"
        results = [
            supra("data", "peek", recipe(path, **data)),
            supra("uptrain", "-r", recipe(path, **data), "-o", output),
        ]
        assert output.exists() == (results[1].code == 0)
        return results

    return run


@pytest.mark.parametrize("case", GOOD_TOO)
def test_what_editors_and_exporters_write_is_read(case, supra, recipe, tmp_path):
    name, content = GOOD_TOO[case]
    (tmp_path / name).write_bytes(content)
    result = supra("data", "peek", recipe(tmp_path / name), "--rows", 100)  # one of which begins the text
    assert result.code == 0, result.err
    assert "'<s>def read(self, size=-1):" in result.out


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_sentence_and_exit_1(fault, both, tmp_path):
    name, content, told = BAD[fault]
    (tmp_path / name).write_bytes(content)
    for result in both(tmp_path / name):
        assert result.code == 1, result.err
        assert told in result.error
        assert str(tmp_path / name) in result.error
        assert result.err.strip().splitlines()[-1] == result.error


@pytest.mark.parametrize("name", ["nowhere.txt", "folder", "folder/*.txt", "link.txt", "loop.txt", "directory.jsonl"])
def test_what_is_no_file_is_one_sentence_and_exit_3(name, both, tmp_path):
    for folder in ("folder", "directory.jsonl"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link.txt").symlink_to("gone.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for result in both(tmp_path / name):
        assert result.code == 3, result.err
        assert f"no data at '{tmp_path / name}'" in result.error
        assert ("the folder holds no file; put .txt" in result.error) == ((tmp_path / name).is_dir())


def test_a_folder_of_something_else_is_one_sentence_that_names_a_file_and_what_is_read(both, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    for result in both(tmp_path / "pictures"):
        assert result.code == 3
        assert "among the 1 in it, such as a.png" in result.error
        assert ".jsonl" in result.error


def test_a_file_whose_name_is_not_utf_8_is_one_sentence_and_exit_1(both, tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_bytes(LINES)
    for path in (tmp_path, tmp_path / "*.jsonl"):
        for result in both(path):
            assert result.code == 1
            assert r"caf\udce9.jsonl' is not UTF-8; rename it" in result.error


@pytest.mark.parametrize("key", ["data.sources.0.path", "data.sources.0.revision", "base", "stages.0.teacher"])
def test_a_name_of_nothing_as_an_unset_variable_gives_it_is_exit_2(key, supra, recipe, tmp_path):
    (tmp_path / "a.txt").write_bytes(GOOD["a.txt"])  # in the working directory
    for verb in (["data", "peek"], ["uptrain", "-o", "run", "-r"]):
        result = supra(*verb, recipe("a.txt"), "--set", f"{key}=")
        assert result.code == 2, result.err
        assert f"{key}: string should have at least 1 character" in result.err
    assert not (tmp_path / "run").exists()


def test_layers_are_not_ranked_by_a_text_without_a_name(supra, base):
    result = supra("convert", base, "--keep", "auto:1", "--text", "")
    assert result.code == 2
    assert "--text is empty" in result.error


def test_a_dataset_saved_to_disk_is_one_sentence_that_says_how_to_write_it(both, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [TEXT]}).save_to_disk(tmp_path / "saved")
    for result in both(tmp_path / "saved"):
        assert result.code == 1
        assert "to_parquet" in result.error


@pytest.mark.parametrize("broken", [b"{\n", DEEP, HALF, b'{"text": null}\n', b"\xff\xfe\n"])
def test_fewer_broken_records_than_the_stated_share_are_skipped(broken, both, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + broken)
    first, cached = both(tmp_path / "a.jsonl", skip_share=0.03)
    assert (first.code, cached.code) == (0, 0)
    for result in (first, cached):  # said again where the tokens come from the cache
        assert result.err.count("a.jsonl: 1 of 41 records were skipped for having no usable text (the first: ") == 1
    assert [result.code for result in both(tmp_path / "a.jsonl", skip_share=0.02)] == [1, 1]


def test_a_file_that_vanishes_between_two_readings_is_one_sentence_and_exit_3(both, tmp_path, monkeypatch):
    fingerprint = sources.fingerprint

    def vanishing(source, split):
        digest = fingerprint(source, split)
        Path(source.path).unlink()
        return digest

    monkeypatch.setattr(sources, "fingerprint", vanishing)
    (tmp_path / "a.txt").write_bytes(GOOD["a.txt"])
    for result in both(tmp_path / "a.txt"):
        assert result.code == 3, result.err
        assert "a.txt" in result.error


@pytest.mark.parametrize("damage", ["ids.npy", "ends.npy", "count.json", "both"])
def test_a_damaged_cache_is_made_again(damage, supra, recipe, own_cache, tmp_path):
    (tmp_path / "a.txt").write_bytes(GOOD["a.txt"])
    first = supra("data", "peek", recipe(tmp_path / "a.txt"))
    assert first.code == 0
    for number, file in enumerate(sorted(file for file in own_cache.rglob("*") if file.is_file())):
        if damage in (file.name, "both"):
            file.write_bytes(file.read_bytes()[: 200 * number])
    assert supra("data", "peek", recipe(tmp_path / "a.txt")) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_files_damaged_anyhow_end_in_success_or_a_documented_exit_code(name, supra, recipe, own_cache, tmp_path):
    """Bytes overwritten, cut off, put in or all drawn at random; a repeated passage takes another path than rows."""
    for seed in range(60):
        (tmp_path / name).write_bytes(damaged(GOOD[name], random.Random(f"{name} {seed}")))
        source = {"path": str(tmp_path / name), "repeat": ("no", "text")[seed % 2]}
        result = supra("data", "peek", recipe("", sources=[source], skip_share=0.5))
        assert result.code in (0, 1, 3), result.err
        assert "internal error" not in result.err, (seed, result.err)
        assert result.code == 0 or result.err.strip().splitlines()[-1] == result.error
        shutil.rmtree(own_cache)


def damaged(content: bytes, chance: random.Random) -> bytes:
    content = bytearray(content)
    match chance.randrange(5):
        case 0:
            for _ in range(chance.choice([1, 5, 100])):
                content[chance.randrange(len(content))] = chance.randrange(256)
        case 1:
            del content[chance.randrange(len(content)) :]
        case 2:
            start = chance.randrange(len(content))
            content[start:start] = chance.randbytes(chance.randrange(1, 300))
        case 3:
            start = chance.randrange(len(content))
            del content[start : start + chance.randrange(1, 300)]
        case 4:
            content = chance.randbytes(chance.randrange(1, 5000))
    return bytes(content)
