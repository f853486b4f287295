"""The page shows the figures it was given, is whole HTML, needs nothing from outside, and survives hostile input."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sslim import cli
from sslim.report import Example, build_report, load_example, save_example, write_report
from sslim.report.markup import Markup, element, escape, number, table
from sslim.report.runs import flatten, read_metrics, read_run


def local(name: str):
    """The hand-made inputs of this folder's conftest."""
    spec = importlib.util.spec_from_file_location("report_inputs", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


HOSTILE, an_example, write_card, write_run = map(local, ("HOSTILE", "an_example", "write_card", "write_run"))
VOID = {"meta", "br", "hr", "img", "link"}


class Checker(HTMLParser):
    """Notes tags that do not close in order, ids, links, handlers and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "srcset"):
                self.links.append(value)
            if name.startswith("on"):
                self.problems.append(f"handler {name}")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.text.append(data)


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    checker.problems += [f"<{tag}> stays open" for tag in checker.open]
    repeated = {name for name in checker.ids if checker.ids.count(name) > 1}
    checker.problems += [f"id {name} repeated" for name in sorted(repeated)]
    missing = {link for link in checker.links if link.startswith("#") and link[1:] not in checker.ids}
    checker.problems += [f"{link} leads nowhere" for link in sorted(missing)]
    used = set(re.findall(r"url\(#([^)]*)\)", text))
    checker.problems += [f"url(#{name}) leads nowhere" for name in sorted(used - set(checker.ids))]
    return checker


@pytest.fixture(scope="module")
def page_text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    run, other = write_run(folder / "demo-run"), write_run(folder / "other-run", seed=1)
    save_example(run, an_example())
    write_card(run / "cards" / "digits.json")
    return build_report([run, other])


def test_the_checker_finds_what_is_broken():
    broken = '<p id="a"><b></p></b><i id="a" onclick="x"><a href="#none">x</a>'
    problems = check(broken).problems
    assert {"handler onclick", "id a repeated", "#none leads nowhere", "<i> stays open"} <= set(problems)
    assert any("closes nothing" in problem for problem in problems)


def test_the_page_is_whole_html_and_needs_nothing_from_outside(page_text):
    checker = check(page_text)
    assert checker.problems == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in checker.links)
    assert "http:" not in page_text
    assert "https:" not in page_text
    assert not {"script", "link", "iframe", "object", "embed"} & set(checker.tags)
    assert checker.tags.count("svg") >= 12


def test_the_page_shows_the_figures(page_text):
    text = " ".join(" ".join(check(page_text).text).split())
    for shown in (
        "demo-run", "other-run", "57.2 ± 0.1", "77.5 ± 1.4", "class alone gives 10.0", "spoken digits",
        "each speaker left out", "log-Mel", "random weights", "2,345,678", "Last values: learning rate 0.0005.",
        "batch 17 was skipped", "bytes: 1,234,567", "model.encoder.dim", "192",
        "14 of 35 hidden frames are predicted right", "115 of 115 visible frames", "oʊ", "synthetic/0001",
        "Runs compared",
    ):  # fmt: skip
        assert shown in text, shown


def test_last_values_are_those_of_the_run(run_folder):
    run = read_run(run_folder)
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if row["kind"] == "valid"][-1]
    assert run.last("valid", "loss") == last["loss"]
    assert number(last["loss"]) in build_report([run_folder])


def test_colours_follow_the_page(page_text):
    assert "var(--ink)" in page_text
    assert "prefers-color-scheme: dark" in page_text
    assert "#0e0d" not in page_text  # no placeholder is left


def hostile_run(folder: Path, bad: str) -> Path:
    run = write_run(folder)
    config = {bad: bad, "corpus": bad}
    (run / "run.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [
        {"step": 1, "kind": "train", "loss": 1.0, f"loss{bad}": 2.0, f"x{bad}": 1.0},
        {"step": 2, "kind": "event", "event": bad, bad: bad},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    name = bad.replace("\ud800", "")  # cannot be written as UTF-8; as an escape in JSON it can come in all the same
    shown = an_example(id=name)
    save_example(run, replace(shown, phone_names=(name,) * len(shown.phone_names)))
    write_card(run / "card.json", task=bad, metric=bad, corpus={"name": bad}, protocol={bad: bad})
    card = json.loads((run / "card.json").read_text(encoding="utf-8"))
    card["rows"].append({"name": bad, "kind": bad, "layer": bad, "scores": [0.4, 0.6], "mean": 0.5, "sd": 0.1, bad: bad})
    (run / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return run


@pytest.mark.parametrize("bad", [HOSTILE, "]]>-->--!><svg/onload=alert(1)>", "日本語 \ud800 $x^{$", "%s {0} \\1 \\g<1>"])
def test_hostile_text_is_only_text(tmp_path, bad):
    text = build_report([hostile_run(tmp_path / "run", bad)], title=bad)
    checker = check(text)
    assert checker.problems == []
    assert not {"script", "iframe", "object"} & set(checker.tags)
    assert not any(CONTROL in text for CONTROL in "\x00\x08\ud800")
    harmless = check(build_report([hostile_run(tmp_path / "control", "harmless")], title="harmless"))
    assert checker.tags.count("svg") == harmless.tags.count("svg")  # nothing was added, nothing swallowed
    assert checker.tags.count("td") == harmless.tags.count("td")


def test_control_unescaped_text_would_be_found():
    assert "script" in check(element("p", Markup(HOSTILE))).tags
    assert "script" not in check(element("p", HOSTILE)).tags
    assert check(element("p", "x", title='"><script>')).tags == ["p"]
    assert escape(escape("<")) == "&lt;"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (0.00012345, "0.0001234"), (3.14159, "3.142"), (1234567.0, "1,234,567"), (float("nan"), "nan"),
     (True, "True"), ("x", "x"), (123456.7, "123,457"), (-5, "-5")],
)  # fmt: skip
def test_numbers_read_well(value, shown):
    assert number(value) == shown


def test_numbers_stand_right_and_words_left():
    text = table(["name", "n"], [["a", 1], ["b", None]], best=1)
    assert '<th>name</th><th class="number">n</th>' in text
    assert '<tr class="best"><td>b</td><td class="number"></td></tr>' in text


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1, "loss": 2}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected an object with a whole-number step"):
        read_metrics(path)


def test_steps_written_again_after_a_resumption_replace_the_first(tmp_path):
    rows = [{"step": s, "kind": "train", "loss": v} for s, v in [(1, 5.0), (2, 4.0), (3, 9.0), (2, 4.0), (3, 3.0), (4, 2.0)]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_run(tmp_path).curves["train", "loss"] == {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "loss": NaN, "gradient_norm": Infinity, "odd": NaN}\n', encoding="utf-8"
    )
    assert check(build_report([tmp_path])).problems == []


def test_flatten_gives_every_setting_once():
    block = {"num_heads": 3}
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": [block, block], "e": [block, {"num_heads": 2}]}) == [
        ("a.b", 1), ("a.c", "1, 2"), ("d[0..1].num_heads", 3), ("e[0].num_heads", 3), ("e[1].num_heads", 2),
    ]  # fmt: skip


def test_an_example_comes_back_as_it_was_saved(tmp_path):
    shown = an_example()
    save_example(tmp_path, shown)
    read = load_example(tmp_path)
    np.testing.assert_array_equal(read.predictions_T, shown.predictions_T)
    np.testing.assert_allclose(read.features_TF, shown.features_TF, rtol=1e-6)
    assert (read.phone_names, read.mask_T.dtype) == (shown.phone_names, np.dtype(bool))
    assert load_example(tmp_path / "none") is None


def test_an_example_whose_parts_do_not_fit_is_refused():
    shown = an_example()
    with pytest.raises(ValueError, match=r"labels_T has shape \(149,\), its features have 150 frames"):
        replace(shown, labels_T=shown.labels_T[1:])
    with pytest.raises(ValueError, match="phone 6, but 2 phone names"):
        replace(shown, phone_names=("a", "b"))
    bare = Example(id="x", frame_shift_s=0.02, features_TF=shown.features_TF, labels_T=shown.labels_T)
    assert bare.mask_T is None


def test_the_command_writes_the_page(run_folder, tmp_path, capsys):
    output = tmp_path / "out" / "page.html"
    assert cli.main(["report", str(run_folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert check(output.read_text(encoding="utf-8")).problems == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "there is no such run, corpus or result file"), (["empty"], "neither a run"), ([], "nothing to report"),
     (["bad.json"], "row 0 is not one of a result card")],
)  # fmt: skip
def test_the_command_refuses_what_it_cannot_show(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"task": "x", "rows": [{"model": "a"}]}', encoding="utf-8")
    assert cli.main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib_the_sentence_says_what_to_install(run_folder, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    assert cli.main(["report", str(run_folder)]) == 1
    assert 'pip install "sslim[report]"' in capsys.readouterr().err


def test_matplotlibs_global_state_is_left_alone(run_folder):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report([run_folder], run_folder / "r.html")
    assert dict(matplotlib.rcParams) == before
