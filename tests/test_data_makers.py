"""The makers of data: the converters of real ones, and that a maker writes the committed bytes."""

import gzip
import inspect
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))

import arithmetic
import gsm8k
import hh_rlhf
import reviews

HH_DIFFERENT_PROMPTS = (1254, 1688, 1950, 1952, 2036)
HH_EMPTY_TURNS = (86, 516, 925, 1103)


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dialogue(*turns):
    return "".join(
        f"\n\n{who}:{text}" for who, text in zip(("Human", "Assistant") * len(turns), turns)
    )


# ---------------------------------------------------------------- HH-RLHF


GOOD = {
    "chosen": dialogue(" q", " a", " b", " yes"),
    "rejected": dialogue(" q", " a", " b", "  no"),
}
NO_TURNS = {"chosen": "no turns", "rejected": "no turns"}


def test_hh_rows_are_split_at_the_last_turn_and_the_rest_is_counted(tmp_path, capsys):
    last = {name: text.replace("q", "q3") for name, text in GOOD.items()}
    differ = {"chosen": dialogue(" q", " a"), "rejected": dialogue(" other", " b")}
    empty = {"chosen": dialogue(" q", " "), "rejected": dialogue(" q", " b")}
    rows = [{name: text.replace("q", f"q{i}") for name, text in GOOD.items()} for i in range(3)]
    source = write(tmp_path / "hh.jsonl", [*rows, differ, empty, NO_TURNS, last])
    out = tmp_path / "out"
    hh_rlhf.main([str(source), str(out), "--test-rows", "1"])
    output = capsys.readouterr().out
    for reason in (
        "empty last turn",
        "no assistant turn",
        "the two dialogues differ before the last turn",
    ):
        assert f"1 of 6 rows dropped: {reason}" in output
    prompt = {"prompt": "\n\nHuman: q3\n\nAssistant: a\n\nHuman: b\n\nAssistant:"}
    for kind, fields in (
        ("preferences", {"chosen": " yes", "rejected": "  no"}),
        ("sft", {"completion": " yes"}),
        ("prompts", {}),
    ):
        assert read(out / f"{kind}_test.jsonl") == [prompt | fields]
        assert len(read(out / f"{kind}_train.jsonl")) == 3


def test_hh_reads_gz_and_writes_each_prompt_once(tmp_path):
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as file:
        file.write((json.dumps(GOOD) + "\n") * 3)
    hh_rlhf.main([str(tmp_path / "hh.jsonl.gz"), str(tmp_path), "--test-rows", "1"])
    assert len(read(tmp_path / "sft_train.jsonl")) == 2
    assert len(read(tmp_path / "prompts_train.jsonl")) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, "{broken"], "line 2 is not JSON"),
        ([GOOD, ""], "line 2 is not JSON"),
        ([GOOD, {"chosen": "x"}], 'line 2: no text under "rejected"'),
        ([{"chosen": 1, "rejected": "x"}], 'line 1: no text under "chosen"'),
        (["[]"], 'line 1: no text under "chosen"'),
        ([], "holds no rows"),
        ([GOOD], "--test-rows 1 should be"),
        ([NO_TURNS, GOOD], "no row of the train split can be used"),
    ],
)
def test_hh_bad_input_gets_one_line(tmp_path, rows, said, error_line):
    source = write(tmp_path / "hh.jsonl", rows)
    assert said in error_line(hh_rlhf.main, [str(source), str(tmp_path), "--test-rows", "1"])


def test_hh_unreadable_files_get_one_line(tmp_path, error_line):
    assert "no file" in error_line(hh_rlhf.main, [str(tmp_path / "x.jsonl"), str(tmp_path)])
    (tmp_path / "x.jsonl.gz").write_text("this is not gzip")
    assert "cannot read" in error_line(hh_rlhf.main, [str(tmp_path / "x.jsonl.gz"), str(tmp_path)])
    (tmp_path / "y.jsonl").write_bytes(b'{"chosen": "\xff"}\n')
    assert "line 1" in error_line(hh_rlhf.main, [str(tmp_path / "y.jsonl"), str(tmp_path)])
    source, taken = write(tmp_path / "hh.jsonl", [GOOD] * 2), write(tmp_path / "taken", [])
    said = error_line(hh_rlhf.main, [str(source), str(taken), "--test-rows", "1"])
    assert "cannot write" in said


@pytest.mark.real_data
def test_hh_harmless_base_test(tmp_path, shared_data, capsys):
    source = shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    rows = hh_rlhf.read_rows(source, ("chosen", "rejected"))
    reasons = {i: r for i, r in enumerate(map(hh_rlhf.convert, rows)) if isinstance(r, str)}
    assert reasons == {
        **dict.fromkeys(HH_DIFFERENT_PROMPTS, "the two dialogues differ before the last turn"),
        **dict.fromkeys(HH_EMPTY_TURNS, "empty last turn"),
    }
    hh_rlhf.main([str(source), str(tmp_path)])
    pairs = read(tmp_path / "preferences_train.jsonl")
    assert (len(pairs), len(read(tmp_path / "preferences_test.jsonl"))) == (1992, 311)
    assert pairs[0]["prompt"] + pairs[0]["chosen"] == rows[0]["chosen"]
    assert pairs[0]["prompt"] + pairs[0]["rejected"] == rows[0]["rejected"]
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in pairs)


# ---------------------------------------------------------------- GSM8K


def test_gsm8k_final_answer():
    answers = {"So 72.\n#### 72": "72", "#### 1,234,567": "1234567", "#### -7 ": "-7"}
    answers |= {"#### $3.50": "3.50", "#### 1\n#### 2": "2"}
    answers |= dict.fromkeys(["no answer", "#### none", "#### 3 apples"])
    assert {text: gsm8k.final_answer(text) for text in answers} == answers


def test_gsm8k_rows(tmp_path):
    row = {"question": "How many?", "answer": "It is 2*600=<<2*600=1200>>1200.\n#### 1,200"}
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [row])
    gsm8k.main([str(tmp_path), str(tmp_path / "out")])
    prompt = "Question: How many?\nAnswer:"
    assert read(tmp_path / "out" / "sft_test.jsonl") == [
        {"prompt": prompt, "completion": " " + row["answer"]}
    ]
    assert read(tmp_path / "out" / "prompts_train.jsonl") == [{"prompt": prompt, "answer": "1200"}]


def test_an_odd_line_separator_in_a_text_ends_no_line(tmp_path):
    row = {"question": "How\u2028many\x85?", "answer": "#### 1"}  # where str.splitlines would break
    for split in ("train", "test"):
        with open(tmp_path / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    gsm8k.main([str(tmp_path), str(tmp_path)])
    assert (
        read(tmp_path / "sft_train.jsonl")[0]["prompt"] == f"Question: {row['question']}\nAnswer:"
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{broken"], "train.jsonl, line 1 is not JSON"),
        ([{"question": "x"}], 'train.jsonl, line 1: no text under "answer"'),
        ([{"question": "x", "answer": "two"}], 'line 1: "answer" does not end in ####'),
        ([], "holds no rows"),
    ],
)
def test_gsm8k_bad_input_gets_one_line(tmp_path, rows, said, error_line):
    write(tmp_path / "train.jsonl", rows)
    assert said in error_line(gsm8k.main, [str(tmp_path), str(tmp_path / "out")])


def test_gsm8k_missing_file_gets_one_line(tmp_path, error_line):
    assert "no file" in error_line(gsm8k.main, [str(tmp_path / "nowhere"), str(tmp_path)])


@pytest.mark.real_data
def test_gsm8k_complete(tmp_path, shared_data):
    gsm8k.main([str(shared_data / "gsm8k"), str(tmp_path)])
    for split, rows in (("train", 7473), ("test", 1319)):
        answers = [row["answer"] for row in read(tmp_path / f"prompts_{split}.jsonl")]
        assert len(answers) == rows and all(float(answer) == int(answer) for answer in answers)
        assert len(read(tmp_path / f"sft_{split}.jsonl")) == rows
    assert answers[:3] == ["18", "3", "70000"]


# ---------------------------------------------------------------- all


@pytest.mark.parametrize(
    ("maker", "most_bytes"),
    [(arithmetic, 2_000_000), pytest.param(reviews, 6_000_000, marks=pytest.mark.slow)],
)
def test_running_it_again_gives_the_committed_bytes(tmp_path, monkeypatch, maker, most_bytes):
    pytest.importorskip("tokenizers")
    """What is zipped counts by its content: another zlib packs it otherwise."""
    folder = maker.FOLDER
    monkeypatch.setattr(maker, "FOLDER", tmp_path)
    maker.main()

    def content(path):
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()

    committed, made = (
        {path.relative_to(x): content(path) for path in x.rglob("*") if path.is_file()}
        for x in (folder, tmp_path)
    )
    assert committed.keys() == made.keys()
    assert [path for path in committed if committed[path] != made[path]] == []
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= most_bytes


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (gsm8k, hh_rlhf, ["fail", "read_rows", "write_rows"]),
        (arithmetic, reviews, ["train_tokenizer"]),
    ],
)
def test_the_makers_share_their_text(one, other, names):
    """Same name, same text: what both define is defined alike."""
    for name in names:
        assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(other, name))


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("data", ["arithmetic", "reviews"])
def test_transformers_reads_the_same_tokens(data):
    import gpt2

    transformers = pytest.importorskip("transformers")
    folder = ROOT / "data" / data / "tokenizer"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), gpt2.load_tokenizer(folder)
    assert theirs.eos_token == "<|endoftext|>" and theirs.pad_token == "<|pad|>"
    for text in ("47+85=132", " the horses were superb. Ünïcode 中\n"):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode_ordinary(text) and theirs.decode(ids) == text
    for token, number in (
        (theirs.eos_token, theirs.eos_token_id),
        ("<|pad|>", theirs.pad_token_id),
    ):
        assert ours.encode(token, allowed_special="all") == [number]
