"""The tools: alarms on recorded runs, what the page shows, and where a profile puts the time."""

import gzip
import http.client
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import dashboard


def has(package):
    return importlib.util.find_spec(package) is not None


needs_plotly = pytest.mark.skipif(not has("plotly"), reason="plotly is not installed")


def write_run(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return dashboard.Run(folder).refresh()


@pytest.fixture(scope="module")
def recorded():
    """{name: rows} of the runs that goldens/README.md names."""
    with gzip.open(ROOT / "tests" / "goldens" / "runs.jsonl.gz", "rt") as file:
        return {run["name"]: run["rows"] for run in map(json.loads, file)}


# ------------------------------------------------------------------------------------------- alarms

BROKEN = {
    "grpo_length": "The KL runs away; Completions stop ending; Groups lose their spread",
    "ppo_lr": "The KL runs away; The entropy collapses; The updates of a rollout are too large",
    "ppo_lr0": "The learning rate is gone",
    "grpo_constant": "Groups lose their spread",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_broken_on_purpose_has_its_alarms(name, recorded, tmp_path):
    run = write_run(tmp_path, recorded[name])
    titles = [alarm.title for alarm in dashboard.find_alarms(run)]
    assert set(BROKEN[name].split("; ")) <= set(titles), titles


def test_good_runs_have_no_alarm(recorded, tmp_path):
    good = [name for name in recorded if name.startswith("good")]
    assert len(good) >= 6
    for name in good:
        rows = recorded[name]
        for count in (1, len(rows) // 10, len(rows) // 3, len(rows)):  # nor while it runs
            run = write_run(tmp_path / f"{name}{count}", rows[:count])
            assert dashboard.find_alarms(run) == [], (name, count)


def change(rows, **changed):
    """The rows with f(value, share of the run) in place of some metrics' values; __ for /."""
    changed = {name.replace("__", "/"): f for name, f in changed.items()}
    count = max(len(rows) - 1, 1)
    return [
        row | {x: f(row[x], i / count) for x, f in changed.items() if x in row}
        for i, row in enumerate(rows)
    ]


CHANGES = {
    "The KL runs away": dict(objective__kl=lambda x, t: x + 40 * t),
    "The KL is negative": dict(objective__kl=lambda x, t: -1.0),
    "The updates of a rollout are too large": dict(policy__clipfrac_avg=lambda x, t: 0.4),
    "The entropy collapses": dict(policy__entropy_avg=lambda x, t: x * (1 - t) ** 2),
    "The gradient spikes": dict(grad_norm=lambda x, t: 30.0 if 0.5 < t < 0.52 else x),
    "A number is not finite": dict(grad_norm=lambda x, t: None if t == 1 else x),
    "Groups lose their spread": dict(frac_reward_zero_std=lambda x, t: t),
    "The critic explains nothing": dict(val__explained_variance=lambda x, t: x - t),
    "The loss rises": dict(loss=lambda x, t: x + 4 * max(t - 0.5, 0)),
    "The pairs teach nothing": dict(rewards__accuracies=lambda x, t: 0.5),
    "The held-out loss rises while the loss falls": dict(
        eval__loss=lambda x, t: x + max(t - 0.5, 0) / 2
    ),
    "Completions shrink to almost nothing": dict(
        completions__mean_length=lambda x, t: x * (1 - t) + 1
    ),
    "The score rises while gold/reward falls": dict(
        gold__reward=lambda x, t: x - 0.6 * max(t - 0.2, 0), reward=lambda x, t: x + 2 * t
    ),
}


BASE = {"The critic explains nothing": "good_ppo", "The loss rises": "good_sft"}
BASE |= dict.fromkeys(["The pairs teach nothing"], "good_dpo")
BASE |= dict.fromkeys(["The held-out loss rises while the loss falls"], "good_reward")


@pytest.mark.parametrize("title", CHANGES)
def test_a_good_run_made_bad_has_that_alarm_and_few_others(title, recorded, tmp_path):
    rows = change(recorded[BASE.get(title, "good_grpo")], **CHANGES[title])
    titles = [alarm.title for alarm in dashboard.find_alarms(write_run(tmp_path, rows))]
    assert title in titles and len(titles) <= 2, titles


def test_an_alarm_says_where_why_and_what_to_do(recorded, tmp_path):
    run = write_run(tmp_path, recorded["ppo_lr0"])
    (alarm,) = (x for x in dashboard.find_alarms(run) if x.title == "The learning rate is gone")
    assert (alarm.metric, alarm.first, alarm.last) == ("lr", 1, run.last_step)
    assert alarm.reason and "--learning-rate" in alarm.remedy


# -------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("policy/approxkl_avg", [None, 0.05]),
        ("val/ratio", [0.95, 1.05]),
        ("eval/completions/clipped_ratio", [None, 0.1]),
        ("reward_std", [0, None]),
        ("objective/kl", None),  # "below 0 for long" is no bound
        ("rewards/reward_model/mean", None),
    ],
)
def test_bands_are_those_of_the_documentation(name, wanted):
    found = dashboard.meaning(name)
    assert found["band"] == (wanted and pytest.approx(wanted)) and found["what"]


def test_a_thinned_curve_keeps_its_ends_and_its_spikes():
    values = np.sin(np.arange(100_000) / 5000)
    values[54_321], values[77_777] = 9, -9
    steps, thinned = dashboard.thin(dashboard.Series(np.arange(100_000), values))
    assert len(steps) <= 2 * dashboard.STRETCHES + 2 and steps == sorted(steps)
    assert steps[0] == 0 and steps[-1] == 99_999
    assert thinned[steps.index(54_321)] == 9 and thinned[steps.index(77_777)] == -9
    assert np.allclose(thinned, values[steps], rtol=1e-5)


def test_a_growing_file_is_read_from_where_it_ended(tmp_path):
    run = write_run(tmp_path, [{"step": 1, "reward": 1.0}])
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 2, "rew')
        file.flush()
        assert run.refresh().last_step == 1  # a line that is being written
        file.write('ard": 2.0}\n')
    assert run.refresh().series["reward"].values.tolist() == [1, 2]
    other = tmp_path / "other"  # --overwrite and --resume replace the file
    other.write_text('{"step": 1, "reward": 7.0}\n')
    other.replace(path)
    assert run.refresh().series["reward"].values.tolist() == [7]


@needs_plotly
def test_a_page_in_one_file(recorded, tmp_path, capsys):
    run = tmp_path / "runs" / "a"
    write_run(run, recorded["good_ppo"])
    sample = {"step": 0, "prompt": "</script><script>alert(1)", "completion": "x", "reward": 1.0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = tmp_path / "page.html"
    dashboard.main(dashboard.Args((str(tmp_path / "runs"),), html=str(page)))
    text = page.read_text("utf-8")
    assert "<script>alert(1)" not in text and "http://" not in text.split("<script>")[0]
    start = text.index('type="application/json">') + len('type="application/json">')
    data = json.loads(text[start : text.index("</script>", start)])
    (shown,) = data["runs"]
    assert shown["samples"] == [sample] and shown["alarms"] == []
    assert shown["series"]["reward"][0] == list(range(1, 61))
    assert {"name", "section", "what", "healthy", "band"} == data["panels"][0].keys()
    assert "page.html" in capsys.readouterr().out


def test_a_wrong_folder_ends_in_one_sentence(tmp_path, error_line):
    assert "no folder" in error_line(dashboard.main, dashboard.Args((str(tmp_path / "x"),)))
    args = dashboard.Args((str(tmp_path),), html=str(tmp_path / "page.html"))
    assert "no metrics" in error_line(dashboard.main, args)


@pytest.fixture
def server(tmp_path):
    """A served page of one run; the server's port and the run's folder."""
    write_run(tmp_path / "run", [{"step": 1, "reward": 1.0}])
    server = ThreadingHTTPServer(("127.0.0.1", 0), dashboard.Handler)
    server.runs = dashboard.find_runs([str(tmp_path / "run")])
    empty = {"runs": [], "panels": []}
    server.page = dashboard.page(empty, live=True) if has("plotly") else "page"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, tmp_path / "run"
    server.shutdown()
    server.server_close()


def test_the_server_shows_the_runs_and_nothing_else(server):
    port, run = server

    def ask(path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers["Sizes"]

    assert ask("/")[0] == 200
    status, content, sizes = ask("/data?")
    assert status == 200 and json.loads(content)["runs"][0]["series"]["reward"] == [[1], [1.0]]
    assert ask(f"/data?{sizes}")[:2] == (204, b"")  # nothing new
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "reward": 3.0}\n')
    assert json.loads(ask(f"/data?{sizes}")[1])["runs"][0]["series"]["reward"] == [[1, 2], [1, 3]]
    assert ask("/../args.json")[0] == 404
    assert ask("/data", method="POST")[0] == 501
    assert ask("/data?", Host="evil.example:80")[0] == 403


@needs_plotly
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.skipif(not has("playwright"), reason="playwright is not installed")
def test_in_a_browser_a_live_curve_grows_and_an_alarm_appears(server, recorded):
    from playwright.sync_api import sync_playwright

    port, run = server
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.set_default_timeout(120_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#plot-reward .main-svg")
        assert page.inner_text("#alarms-title") == "No alarms"
        write_run(run, recorded["ppo_lr"])
        page.wait_for_selector(".alarm")
        assert "The KL runs away" in page.inner_text("#alarms")
        # The first is the curve of training, the last that of held-out rewards, one point here.
        count = "document.getElementById('plot-reward').data[0].x.length"
        page.wait_for_function(f"{count} > 1")
        assert not errors
        browser.close()


# ---------------------------------------------------------------------------------------- profiler

SCRIPT = '''
"""A script with the parts that the profiler knows by their names."""
import time
import jax
import jax.numpy as jnp


@jax.jit
def train_step(state, batch):
    def one(x, _):
        return x @ batch["x"], None

    return jax.lax.scan(one, state, None, length=7)[0]


def score(rows):
    time.sleep(0.2)
    return rows


def evaluate(rows):
    return score(rows)


def main(args):
    batch = {"x": jnp.eye(64), "mask": jnp.ones((4, 5), jnp.int32)}
    state = jnp.ones((64, 64))
    for _ in range(3):
        score([1])
        state = train_step(state, batch)
    evaluate([1])


args = None
if __name__ == "__main__":
    main(args)
'''


def test_the_profiler_finds_time_tokens_and_flops(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "profiler.py"), "--out", str(out), "script.py"]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    text = (out / "profile.md").read_text()
    assert text in done.stdout
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {cells[0]: [x.strip("| ") for x in cells[1:]] for cells in rows}
    wall = float(text.split("Wall time ")[1].split(" s")[0])
    assert wall <= whole
    assert float(rows["**sum**"][0]) == pytest.approx(wall, rel=0.03)
    assert float(rows["rewards"][0]) >= 0.6 and rows["rewards"][2] == "3"
    assert float(rows["evaluation"][0]) >= 0.2  # the score inside evaluate, too
    assert rows["updates"][2] == "3" and float(rows["compilation"][0]) > 0
    wanted = 3 * 7 * 2 * 64**3 / 1e9  # a loop counts as often as it runs
    assert float(rows["updates"][4]) == pytest.approx(wanted, abs=6e-4)


def test_the_profiler_refuses_what_it_cannot_run(tmp_path, error_line):
    import profiler

    assert "no file x.py" in error_line(profiler.main, ["x.py"])
    (tmp_path / "a.py").write_text("print(1)\n")
    assert "does not end with" in error_line(
        profiler.main, ["--out", str(tmp_path), str(tmp_path / "a.py")]
    )
