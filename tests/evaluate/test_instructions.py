"""Instruction following by the harness's code: what it is given, and what it says."""

import importlib
import json
import sys
import types

import pytest
import tiny_run

from opd_jax.evaluate import grading, tasks

GOLD = {
    "prompt": "Write without commas, in two paragraphs.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_paragraphs"],
    "kwargs": [{}, {"num_paragraphs": 2}],
}


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for the harness's module: no comma, and nothing unknown."""
    asked = []

    def check(example, response):
        asked.append((example, response))
        if "unknown" in example["instruction_id_list"]:
            raise KeyError("unknown")
        if "sentences" in example["instruction_id_list"]:
            raise LookupError("Resource punkt_tab not found: nltk.download('punkt_tab')")
        for given in example["kwargs"]:
            if "colour" in given:
                raise TypeError("unexpected keyword 'colour'")
        return types.SimpleNamespace(follow_all_instructions="," not in response)

    module = types.ModuleType("lm_eval.tasks.ifeval.utils")
    module.InputExample = dict
    module.test_instruction_following_strict = check
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", module)
    return asked


def test_the_response_behind_its_thought_is_checked(harness):
    gold = json.dumps(GOLD)
    found = grading.ifeval("<think>a, b</think> No comma", gold)
    assert found == grading.Verdict(True, "all instructions followed", "No comma")
    assert harness[0] == (GOLD | {"key": 0}, "No comma")
    assert grading.ifeval("a, b", gold).reason == "an instruction not followed"
    assert grading.ifeval("<think>a", gold).is_unparsed
    assert grading.ifeval("<think>a</think> ", gold).is_unparsed
    with pytest.raises(ValueError, match="'unknown' is not known"):
        grading.ifeval("a", json.dumps(GOLD | {"instruction_id_list": ["unknown", "unknown"]}))


@pytest.mark.usefixtures("harness")
def test_lines_of_ifeval_are_read(tmp_path):
    path = tmp_path / "ifeval.jsonl"
    tiny_run.write_lines(path, [{"key": 1000, **GOLD}])
    (problem,) = tasks.read(str(path)).problems
    assert (problem.grader, problem.question) == ("ifeval", GOLD["prompt"])
    assert json.loads(problem.answer) == GOLD
    tiny_run.write_lines(path, [GOLD | {"kwargs": [{}]}])
    for changed, part in (
        ({"kwargs": [{}]}, "2 instructions and 1 kwargs"),
        ({"kwargs": [{}, {"colour": 2}]}, "TypeError: unexpected keyword 'colour'"),
        ({"instruction_id_list": ["punctuation:no_comma", "unknown"]}, "'unknown' is not known"),
        ({"kwargs": None}, "field 'kwargs' is None"),
    ):
        tiny_run.write_lines(path, [GOLD, GOLD | changed])
        with pytest.raises(tasks.TaskError, match=rf"ifeval.jsonl:2: .*{part}"):
            tasks.read(str(path))


@pytest.mark.usefixtures("harness")
def test_without_the_data_of_nltk_it_says_how_to_get_it():
    with pytest.raises(
        ImportError, match=r"^sentences, sentences is .*; python -m nltk.downloader punkt_tab"
    ):
        grading.check("ifeval", json.dumps(GOLD | {"instruction_id_list": ["sentences"] * 2}))


def test_without_the_harness_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'opd-jax\[lm-eval\]'"):
        grading.ifeval("a", json.dumps(GOLD))
    tiny_run.write_lines(tmp_path / "ifeval.jsonl", [GOLD])
    with pytest.raises(ImportError, match=r"pip install 'opd-jax\[lm-eval\]'"):
        tasks.read(str(tmp_path / "ifeval.jsonl"))


@pytest.mark.ci
@pytest.mark.optimized
def test_the_harness_itself(monkeypatch, tmp_path):
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)  # else it would be downloaded
    nltk = importlib.import_module("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    gold = json.dumps(GOLD)
    assert grading.ifeval("One paragraph.\n***\nAnother one.", gold).correct
    assert not grading.ifeval("One paragraph, and more.\n***\nAnother one.", gold).correct
    assert not grading.ifeval("One paragraph.", gold).correct
    path = tmp_path / "ifeval.jsonl"
    tiny_run.write_lines(path, [{"key": 1000, **GOLD}])
    assert tasks.read(str(path)).problems[0].grader == "ifeval"
    for changed, part in (
        ({"instruction_id_list": ["punctuation:no_comma", "no:such"]}, "'no:such' is not known"),
        ({"kwargs": [{}, {"colour": 2}]}, "unexpected keyword argument 'colour'"),
    ):
        tiny_run.write_lines(path, [GOLD | changed])
        with pytest.raises(tasks.TaskError, match=part):
            tasks.read(str(path))
