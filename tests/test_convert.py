"""data/convert.py: what it reads, how it splits and renders chats, what it drops and refuses."""

import builtins
import gzip
import inspect
import itertools
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))

import convert
import hh_rlhf

datasets = pytest.importorskip("datasets")
jinja2 = pytest.importorskip("jinja2")

USER = [{"role": "user", "content": "2 + 2?"}]
YES = [{"role": "assistant", "content": "4"}]
NO = [{"role": "assistant", "content": "5"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
MORE = [*USER, *YES, {"role": "user", "content": "Sure?"}]
PLAIN = "\n\nHuman: 2 + 2?\n\nAssistant:"
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run(source, out, **flags):
    convert.main(convert.Args(source=str(source), out=str(out), **flags))


def read(folder, name):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------- read

ROWS = [{"messages": [*USER, {"role": "assistant", "content": f"{i}"}], "id": i} for i in range(40)]


def as_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def as_arrow(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return next((folder / "saved").glob("*.arrow"))


def as_saved_folder(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder):
    splits = {"train": datasets.Dataset.from_list(ROWS), "rest": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def as_folder_of_files(folder):
    (folder / "files").mkdir()
    as_parquet(folder).rename(folder / "files" / "train.parquet")
    return folder / "files"


def as_json_array(folder):
    (folder / "x.json").write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8")
    return folder / "x.json"


def as_packed_lines(folder):
    with gzip.open(folder / "x.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return folder / "x.jsonl.gz"


FORMATS = [as_parquet, as_arrow, as_saved_folder, as_saved_splits, as_folder_of_files]
FORMATS += [as_json_array, as_packed_lines]


@pytest.mark.parametrize("make", FORMATS)
def test_every_format_gives_the_same(make, tmp_path, capsys):
    run(make(tmp_path), tmp_path / "out")
    sft = [{"prompt": PLAIN, "completion": f" {i}"} for i in range(40)]
    assert read(tmp_path / "out", "sft_train") == sft[:38]  # a twentieth is held out: the end
    assert read(tmp_path / "out", "sft_test") == sft[38:]
    prompts = read(tmp_path / "out", "prompts_test")
    assert prompts == [{"prompt": PLAIN, "id": 38}, {"prompt": PLAIN, "id": 39}]
    assert not (tmp_path / "out" / "preferences_train.jsonl").exists()
    said = capsys.readouterr().out
    assert (
        f"python sft.py --learning-rate 2e-5 --model gpt2 --dataset {tmp_path}/out/sft_tr" in said
    )
    assert "grpo.py" in said and "--model runs/out_sft/model" in said and "dpo.py" not in said


def test_splits_limit_and_kind(tmp_path):
    source = as_saved_splits(tmp_path)
    flags = {"test_split": "rest", "limit": 7, "kind": "prompts"}
    run(source, tmp_path / "out", **flags)
    assert len(read(tmp_path / "out", "prompts_train")) == 7
    assert len(read(tmp_path / "out", "prompts_test")) == 7
    assert not (tmp_path / "out" / "sft_train.jsonl").exists()
    run(source, tmp_path / "out", split="rest", test_rows=15)
    assert len(read(tmp_path / "out", "sft_test")) == 15


def test_a_hub_name_is_handed_on(tmp_path, monkeypatch):
    calls = []
    data = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *x, **y: calls.append((x, y)) or data)
    run("openai/gsm8k", tmp_path, config="main", split="train[:40]", test_split="test")
    given = ("openai/gsm8k", "main")
    assert calls == [(given, {"split": "train[:40]"}), (given, {"split": "test"})]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_is_read_as_text(separator, tmp_path):
    """No 007 becomes 7, no "None" a gap; extra columns go to prompts."""
    table = [
        ["question", "answer", "level"],
        ["a", "007", "1"],
        ["b", "None", ""],
        ["c", " x", "3"],
    ]
    path = tmp_path / ("x.csv" if separator == "," else "x.tsv")
    path.write_text("".join(separator.join(row) + "\n" for row in table))
    run(path, tmp_path, prompt="question", completion="answer", test_rows=1)
    assert read(tmp_path, "sft_train") == [
        {"prompt": "a", "completion": "007"},
        {"prompt": "b", "completion": "None"},
    ]
    assert read(tmp_path, "prompts_test") == [{"prompt": "c", "answer": " x", "level": "3"}]
    run(path, tmp_path, prompt="question", completion="answer", as_chat=True, test_rows=1)
    assert read(tmp_path, "sft_train")[0] == {
        "prompt": "\n\nHuman: a\n\nAssistant:",
        "completion": " 007",
    }


def test_what_json_lacks_and_dates_in_texts(tmp_path):
    rows = [{"prompt": f"{i}", "answer": "2026-01-31", "n": float("nan")} for i in range(2)]
    run(lines(tmp_path / "x.jsonl", rows), tmp_path)
    assert read(tmp_path, "prompts_test") == [{"prompt": "1", "answer": "2026-01-31", "n": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    run(tmp_path / "x.parquet", tmp_path / "parquet")
    assert read(tmp_path / "parquet", "prompts_test") == read(tmp_path, "prompts_test")


# ----------------------------------------------------------------------------------------- convert

TWO_WAYS = {"chosen": [*MORE, *YES], "rejected": [*MORE, *NO]}
HH = {"chosen": PLAIN + " 4", "rejected": PLAIN + " 5"}
SURE = f"{PLAIN} 4\n\nHuman: Sure?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (TWO_WAYS, SURE),  # implicit prompts
        (HH, PLAIN),
        (TWO_WAYS | {"prompt": "Sure?", "messages": [*MORE, *YES]}, SURE),  # as UltraFeedback
        ({"prompt": MORE, "chosen": YES, "rejected": NO}, SURE),
        ({"prompt": "2 + 2?", "chosen": YES, "rejected": NO}, PLAIN),
        ({"prompt": SYSTEM + USER, "chosen": YES, "rejected": NO}, f"\n\nSystem: Be brief.{PLAIN}"),
        ({"prompt": "plain", "chosen": " 4", "rejected": " 5", "margin": 2}, "plain"),
    ],
)
def test_preferences(row, prompt, tmp_path):
    run(lines(tmp_path / "x.jsonl", [row, row]), tmp_path)
    margin = {"margin": 2.0} if "margin" in row else {}
    pair = {"prompt": prompt, "chosen": " 4", "rejected": " 5"}
    assert read(tmp_path, "preferences_test") == [pair | margin]
    assert read(tmp_path, "sft_test") == [{"prompt": prompt, "completion": " 4"}]
    assert read(tmp_path, "prompts_test") == [{"prompt": prompt} | margin]


def test_prompts_alone_and_texts_alone(tmp_path):
    rows = [{"prompt": USER, "answer": 4}, {"prompt": USER, "answer": 4}, {"prompt": MORE}]
    run(lines(tmp_path / "x.jsonl", rows), tmp_path)
    assert read(tmp_path, "prompts_train") == [{"prompt": PLAIN, "answer": 4}]  # equal rows: once
    assert read(tmp_path, "prompts_test") == [{"prompt": SURE}]
    run(lines(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}]), tmp_path)
    assert read(tmp_path, "sft_train") == [{"text": "a"}]


def test_messages_may_wait_for_an_answer(tmp_path):
    """As prompts they do; those that have one lose it."""
    path = lines(tmp_path / "x.jsonl", [{"messages": MORE}, {"messages": [*MORE, *YES]}])
    run(path, tmp_path, kind="prompts")
    assert read(tmp_path, "prompts_train") == read(tmp_path, "prompts_test") == [{"prompt": SURE}]


def test_keep_leaves_prompts_as_lists(tmp_path, capsys):
    table = [{"messages": [*USER, {"role": "assistant", "content": "4", "name": "x"}]}] * 2
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "x.parquet")
    run(tmp_path / "x.parquet", tmp_path, template="keep")
    assert read(tmp_path, "prompts_train") == [{"prompt": USER}]  # without "name": None
    assert not (tmp_path / "sft_train.jsonl").exists()
    assert "grpo_llama.py" in capsys.readouterr().out


def test_dropped_rows_are_counted_by_reason(tmp_path, capsys):
    good = {"messages": [*USER, *YES]}
    rows = [good, {"messages": USER}, {"messages": []}, {"messages": None}, {"messages": YES}]
    rows += [{"messages": [{"from": "human", "value": "x"}]}, {"messages": "no turns"}]
    rows += [{"messages": [*USER, {"role": "assistant", "content": " "}]}]
    rows += [{"messages": [{"role": "user", "content": [{"type": "image"}]}, *YES]}]
    run(lines(tmp_path / "x.jsonl", [*rows, good]), tmp_path, test_rows=1)
    said = capsys.readouterr().out
    assert "train: 3 of 9 rows dropped: neither a text nor messages {role, content} under" in said
    for reason in (
        "the last turn is not the assistant's",
        "the prompt's last turn is not the user's",
        "no assistant turn",
        "empty answer",
        "a message's content is no text",
    ):
        assert f"train: 1 of 9 rows dropped: {reason}\n" in said
    assert len(read(tmp_path, "sft_train")) == 1


# ---------------------------------------------------------------------------------------- template


def tokenizer_folder(folder, template, **config):
    folder.mkdir(exist_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_chat_template_with_its_eos(tmp_path):
    """The scripts add EOS: where the template ends in it, it is not written twice."""
    path = lines(tmp_path / "x.jsonl", [TWO_WAYS, HH])
    asked = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    for eos, end in (({"content": "<|im_end|>"}, ""), ("</s>", "<|im_end|>\n")):
        folder = tokenizer_folder(tmp_path / "chatml", CHATML, eos_token=eos)
        run(path, tmp_path, template=str(folder))
        assert read(tmp_path, "preferences_test") == [
            {"prompt": asked, "chosen": f"4{end}", "rejected": f"5{end}"}
        ]
        prompt = read(tmp_path, "preferences_train")[0]["prompt"]
        assert prompt.startswith(asked + "4<|im_end|>\n<|im_start|>user\nSure?")


def test_a_template_that_refuses_or_changes_the_prompt(tmp_path, capsys):
    strict = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
    folder = tokenizer_folder(tmp_path / "strict", strict)
    rows = [{"messages": [*USER, *YES]}, {"messages": [*SYSTEM, *USER, *YES]}] * 2
    path = lines(tmp_path / "x.jsonl", rows)
    run(path, tmp_path, template=str(folder), test_rows=2)
    assert "train: 1 of 2 rows dropped: the template fails: no system" in capsys.readouterr().out
    folder = tokenizer_folder(tmp_path / "counts", "{{ messages | length }}" + CHATML)
    with pytest.raises(SystemExit):
        run(path, tmp_path, template=str(folder), test_rows=2)
    assert "the template changes a prompt that has an answer" in capsys.readouterr().out


OWN_TEMPLATES = {
    "chatml": CHATML,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' -%}\n {%- generation %}\n"
    "{{ m.content }}{{ eos_token }}\n  {%- endgeneration -%} {% else %}[{{ m.content }}]\n"
    "{% endif %}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "filters": "{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ tools }}{{ strftime_now('%Y') }}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}"
    "{{ sep_token }}{{ pad_token }}",
}
DIALOGUES = [USER, MORE, [*USER, *YES], [*MORE, *NO], [*SYSTEM, *MORE], [*SYSTEM, *MORE, *YES]]
DIALOGUES += [[{"role": "user", "content": " <b> “ünï” & 'x'\n\n"}, *YES]]


# Of TRL's package, as their models have them.
THEIRS = ["cohere", "deepseek_r1_distill", "gemma3", "glm4moe", "gptoss", "lfm2", "llama3"]
THEIRS += ["llama3_2", "phi3", "qwen2_5", "qwen3", "qwen3_training", "smollm3", "zephyr"]


def trl_templates():
    trl = pytest.importorskip("trl")
    paths = {x.stem: x for x in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
    return {name: paths[name].read_text("utf-8") for name in THEIRS if name in paths}


@pytest.mark.parity
def test_templates_are_rendered_as_in_transformers(tmp_path):
    """Byte by byte, or both refuse; TRL's package has templates of many models."""
    transformers = pytest.importorskip("transformers")
    compared = {}
    for name, template in (OWN_TEMPLATES | trl_templates()).items():
        folder = tokenizer_folder(tmp_path / name, template)
        saved = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "reviews" / "tokenizer")
        saved.chat_template, saved.bos_token = template, "<|pad|>"
        saved.save_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        render, eos = convert.load_template(folder)
        assert eos == theirs.eos_token
        for messages, asked in itertools.product(DIALOGUES, [False, True]):
            try:
                wanted = theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asked
                )
            except Exception:
                with pytest.raises(convert.Dropped):
                    render(messages, asked)
                continue
            assert render(messages, asked) == wanted, name
            compared[name] = compared.get(name, 0) + 1
    assert len(compared) >= 10 and sum(compared.values()) > 100, compared


@pytest.mark.parity
def test_rows_are_rendered_as_in_trl(tmp_path):
    """Prompts and answers, up to the EOS that TRL leaves in and the scripts add."""
    transformers = pytest.importorskip("transformers")
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "reviews" / "tokenizer")
    row = {"prompt": MORE, "chosen": YES, "rejected": NO}
    compared = 0
    for name, template in trl_templates().items():
        theirs.chat_template = template
        try:
            wanted = data_utils.apply_chat_template(row, theirs)
        except Exception:
            continue
        folder = tokenizer_folder(tmp_path / name, template, **theirs.special_tokens_map)
        render, eos = convert.load_template(folder)
        found = convert.render_row(MORE, [YES, NO], render, eos, False)
        prompt, *ends = (wanted[x] for x in ("prompt", "chosen", "rejected"))
        ends = [x.rstrip()[: -len(eos)] if x.rstrip().endswith(eos) else x for x in ends]
        assert found == [prompt, *ends], name
        compared += 1
    assert compared >= 10


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ('{"prompt": "x"}\n{broken', {}, "line 2 is not JSON"),
        ("[1, 2]", {}, "not all rows are objects"),
        ('[{"prompt": 1', {}, "cannot read"),
        ("", {}, "0 rows leave none"),
        ('{"prompt": "x"}\n', {}, "1 rows leave none"),
        ('{"a": 1}\n{"b": 1}\n', {}, "what are the columns a, b? Name them with --chosen"),
        ('{"a": "x"}\n' * 2, {"prompt": "q"}, "--prompt q: there are only a"),
        ('{"prompt": "x"}\n' * 2, {"kind": "sft"}, "the columns prompt give prompts"),
        ('{"prompt": [1]}\n' * 2, {}, "no row of the train split can be used"),
        ('{"prompt": "x"}\n' * 2, {"split": "test"}, 'no split "test", only "train"'),
        ('{"prompt": "x"}\n' * 2, {"test_rows": 2}, "leave none to train on"),
        ('{"prompt": "x"}\n' * 2, {"test_rows": 0}, "--test-rows should be at least 1"),
        ('{"prompt": "x"}\n' * 2, {"limit": -1}, "--limit should be at least 1"),
        ('{"prompt": "x"}\n' * 2, {"template": "nowhere"}, "no folder nowhere"),
        ('{"text": "x"}\n' * 2, {"template": "keep"}, "the columns text give sft"),
    ],
)
def test_bad_input_gets_one_line(content, flags, said, tmp_path, error_line):
    (tmp_path / "x.json").write_text(content)
    args = convert.Args(source=str(tmp_path / "x.json"), out=str(tmp_path / "out"), **flags)
    assert said in error_line(convert.main, args)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.parquet", b"nonsense", "cannot read"),
        ("x.arrow", b"nonsense", "cannot read"),
        ("x.csv", b"", "cannot read"),
        ("x.csv", b'a,b\n"1,2\n', "cannot read"),
        ("x.jsonl", b"\xff\xfe", "cannot read"),
        ("x.jsonl.gz", b"nonsense", "cannot read"),
        ("x.docx", b"nonsense", "ends in none of .csv"),
        ("nowhere/x.parquet", None, "no file or folder"),
        ("nowhere", None, "no file or folder"),
        ("empty", "folder", "cannot read"),
    ],
)
def test_unreadable_sources_get_one_line(name, content, said, tmp_path, error_line):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    args = convert.Args(source=str(path), out=str(tmp_path / "out"))
    assert said in error_line(convert.main, args)


@pytest.mark.parametrize(
    ("template", "config", "said"),
    [
        ("{% if %}", "{}", "cannot read the chat template"),
        ("", "{broken", "cannot read the chat template"),
        ("", "{}", "has no chat template"),
    ],
)
def test_bad_templates_get_one_line(template, config, said, tmp_path, error_line):
    folder = tokenizer_folder(tmp_path, template)
    (folder / "tokenizer_config.json").write_text(config)
    assert said in error_line(convert.load_template, folder)


@pytest.mark.parametrize("absent", ["datasets", "jinja2"])
def test_an_absent_package_is_named(absent, tmp_path, monkeypatch, error_line):
    source, template = as_parquet(tmp_path), tokenizer_folder(tmp_path / "folder", CHATML)
    real = builtins.__import__

    def importing(name, *rest):
        if name.split(".")[0] == absent:
            raise ModuleNotFoundError(f"No module named '{absent}'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    flags = {"template": str(template)} if absent == "jinja2" else {}
    args = convert.Args(source=str(source), out=str(tmp_path / "out"), **flags)
    assert f"run `pip install {absent}`" in error_line(convert.main, args)


def test_it_shares_text_with_the_other_makers():
    for name in ("fail", "write_rows"):
        assert inspect.getsource(getattr(convert, name)) == inspect.getsource(
            getattr(hh_rlhf, name)
        )
    assert convert.ASSISTANT == hh_rlhf.ASSISTANT


@pytest.mark.real_data
def test_hh_comes_out_as_from_its_own_maker(tmp_path, shared_data, capsys):
    source = str(shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    hh_rlhf.main([source, str(tmp_path / "theirs")])
    run(source, tmp_path / "ours", test_rows=312)
    for kind, split in itertools.product(("sft", "preferences", "prompts"), ("train", "test")):
        name = f"{kind}_{split}.jsonl"
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    dropped = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    assert [x.split(":")[1] for x in dropped] == [x.split(":")[1] for x in dropped[:3]] * 2
