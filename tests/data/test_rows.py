from __future__ import annotations

import json
import subprocess
import sys

import pytest

from srde.data.domains import DOMAINS
from srde.data.rows import Row, read_rows, scan_rows, try_row
from srde.errors import DataError

GOOD = '{"prompt": "1+1?", "response": "2"}'


def test_prompt_and_response_with_all_fields(jsonl):
    record = {
        "prompt": "1+1?", "response": "2", "domain": "math", "source": "ours", "id": "a/1", "kind": "number", "answer": "2",
        "license": "MIT", "n_options": 4, "metadata": {"unit": "m"},
    }  # fmt: skip
    path = jsonl(json.dumps(record))
    (row,) = read_rows(path)
    assert row.prompt == [{"role": "user", "content": "1+1?"}]
    assert (row.response, row.domain, row.source, row.id) == ("2", "math", "ours", "a/1")
    assert (row.kind, row.answer, row.license) == ("number", "2", "MIT")
    assert row.metadata == {"n_options": 4, "unit": "m"}
    assert (row.file, row.line) == (str(path), 1)


def test_completion_is_another_name_of_response(jsonl):
    assert read_rows(jsonl('{"prompt": "a", "completion": "b"}'))[0].response == "b"


def test_last_assistant_turn_is_the_response(jsonl):
    turns = [{"role": role, "content": text} for role, text in
             [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]]  # fmt: skip
    (row,) = read_rows(jsonl(json.dumps({"messages": turns})))
    assert row.prompt == turns[:-1]
    assert row.response == "a2"


def test_instructions_with_and_without_an_input(jsonl):
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    without = {name: text for name, text in alpaca.items() if name != "input"}
    contents = [
        alpaca,
        without,
        alpaca | {"input": ""},
        alpaca | {"input": None},
        alpaca | {"domain": "math", "n": 1},
    ]
    rows = read_rows(jsonl(*map(json.dumps, contents)))
    prompts = ["Add.\n\n1 2", "Add.", "Add.", "Add.", "Add.\n\n1 2"]
    assert [row.prompt for row in rows] == [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert {row.response for row in rows} == {"3"}
    assert (rows[4].domain, rows[4].metadata) == ("math", {"n": 1}) and rows[0].metadata == {}


def test_input_and_output_belong_to_instructions_alone(jsonl):
    (row,) = read_rows(jsonl('{"prompt": "a", "response": "b", "input": "c", "output": "d"}'))
    assert row.prompt == [{"role": "user", "content": "a"}] and row.response == "b"
    assert row.metadata == {"input": "c", "output": "d"}


def test_sharegpt_conversations_have_the_roles_of_messages(jsonl):
    said = [
        ("system", "s"),
        ("human", "u1"),
        ("gpt", "a1"),
        ("user", "u2"),
        ("tool", "t"),
        ("chatgpt", "a2"),
        ("human", "u3"),
    ]
    for last in ("gpt", "assistant", "chatgpt", "model"):
        turns = [{"from": role, "value": text, "weight": 1} for role, text in [*said, (last, "a3")]]
        (row,) = read_rows(jsonl(json.dumps({"conversations": turns, "id": "7"})))
        roles = ["system", "user", "assistant", "user", "tool", "assistant", "user"]
        assert row.prompt == [
            {"role": role, "content": text} for role, (_, text) in zip(roles, said, strict=True)
        ]
        assert (row.response, row.id, row.metadata) == ("a3", "7", {})


def test_a_document_is_kept(jsonl):
    rows = read_rows(
        jsonl('{"prompt": "a", "response": "b", "document": "d 1"}', GOOD, '{"text": "a", "document": null}')
    )
    assert [row.document for row in rows] == ["d 1", None, None]
    assert all(row.metadata == {} for row in rows)


def test_errors_stand_in_the_place_of_their_rows(jsonl):
    path = jsonl(GOOD, "", "nonsense", GOOD, '{"prompt": "a"}', "[1]", GOOD)
    found = list(scan_rows(path))
    assert [isinstance(one, Row) for one in found] == [True, False, True, False, False, True]
    assert [one.line for one in found if isinstance(one, Row)] == [1, 4, 7]
    starts = [
        f"{path}:3: row: is not JSON",
        f"{path}:5: response: is missing",
        f"{path}:6: row: must be a JSON object",
    ]
    errors = [str(one) for one in found if isinstance(one, DataError)]
    assert all(error.startswith(start) for error, start in zip(errors, starts, strict=True))
    with pytest.raises(DataError, match=r":3: row: is not JSON"):
        read_rows(path)


def test_only_bad_rows_are_no_empty_file(jsonl):
    (error,) = scan_rows(jsonl("nonsense"))
    assert isinstance(error, DataError)


def test_records_are_read_like_lines():
    assert try_row(GOOD.encode(), "f", 3) == try_row(json.loads(GOOD), "f", 3)
    assert (
        str(try_row({"prompt": 1, "response": "a"}, "f", 3)) == "f:3: prompt: must be a string, not a number"
    )
    assert str(try_row(b"[", "f", 3)).startswith("f:3: row: is not JSON")


def test_text_has_no_prompt(jsonl):
    (row,) = read_rows(jsonl('{"text": "once upon a time", "domain": "tales"}'))
    assert (row.prompt, row.response, row.domain) == ([], "once upon a time", "tales")


def test_lines_are_counted_with_blank_ones_and_unusual_characters(jsonl):
    rows = read_rows(jsonl(GOOD, "", "   ", '{"prompt": "a\u2028b", "response": "c"}', ""))
    assert [row.line for row in rows] == [1, 4]
    assert rows[1].prompt[0]["content"] == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a",', "row: is not JSON: "),
        ("not json", "row: is not JSON: Expecting value at column 1"),
        (b'{"prompt": "\xff"}', "row: is not UTF-8: byte 0xff at column 13"),
        ("[" * 100_000, "row: is not a row: its JSON is nested too deeply"),
        ("[1]", "row: must be a JSON object, not a list"),
        ('"text"', "row: must be a JSON object, not a string"),
        ("null", "row: must be a JSON object, not null"),
        ("{}", "row: must have exactly one of"),
        ('{"question": "a", "reply": "b"}', "it has only question, reply"),
        ('{"text": "a", "prompt": "b", "response": "c"}', 'it has "prompt" and "text"'),
        ('{"prompt": "a"}', "response: is missing"),
        ('{"prompt": "a", "response": "b", "completion": "b"}', "response: given twice"),
        ('{"prompt": "a", "response": ""}', "response: is empty"),
        ('{"prompt": "a", "completion": " \\n"}', "completion: is empty"),
        ('{"prompt": "a", "response": 2}', "response: must be a string, not a number"),
        ('{"prompt": ["a"], "response": "b"}', "prompt: must be a string, not a list"),
        ('{"prompt": "", "response": "b"}', "prompt: is empty"),
        ('{"text": null}', "text: must be a string, not null"),
        ('{"text": "a\\ud800"}', "text: holds the lone surrogate \\ud800"),
        ('{"messages": "hello"}', "messages: must be a list of at least two turns"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages: must be a list of at least two turns"),
        ('{"messages": ["a", "b"]}', "messages[0]: must be an object with role and content, not a string"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "messages[0].content: is missing"),
        ('{"messages": [{"content": "a"}, {"role": "assistant", "content": "a"}]}', "messages[0].role: is missing"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
         "messages[1].role: must be 'assistant', not 'user'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
         "messages[1].content: is empty"),
        ('{"instruction": "a"}', "output: is missing; an instruction needs its output"),
        ('{"instruction": "a", "output": ""}', "output: is empty"),
        ('{"instruction": "a", "output": null}', "output: must be a string, not null"),
        ('{"instruction": "", "output": "b"}', "instruction: is empty"),
        ('{"instruction": ["a"], "output": "b"}', "instruction: must be a string, not a list"),
        ('{"instruction": "a", "input": 3, "output": "b"}', "input: must be a string, not a number"),
        ('{"instruction": "a", "input": " ", "output": "b"}', "input: is empty"),
        ('{"instruction": "a", "output": "b", "prompt": "c"}', 'it has "prompt" and "instruction"'),
        ('{"conversations": {"from": "human"}}', "conversations: must be a list of at least two turns"),
        ('{"conversations": [{"from": "gpt", "value": "a"}]}', "conversations: must be a list of at least two turns"),
        ('{"conversations": ["a", "b"]}', "conversations[0]: must be an object with from and value, not a string"),
        ('{"conversations": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}',
         "conversations[0].from: is missing"),
        ('{"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}', "conversations[0].value: is missing"),
        ('{"conversations": [{"from": "bing", "value": "a"}, {"from": "gpt", "value": "b"}]}',
         "conversations[0].from: must be one of human, user, gpt, assistant, chatgpt, model, system, tool, not 'bing'"),
        ('{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
         "conversations[1].from: must be 'assistant', not 'user': the last turn is the response"),
        ('{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]}',
         "conversations[0].value: must be a string, not a number"),
        ('{"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]}',
         "conversations[0].from: must be a string, not a list"),
        ('{"text": "a", "document": 3}', "document: must be a string, not a number"),
        ('{"text": "a", "document": " "}', "document: is empty"),
        ('{"text": "a", "domain": 3}', "domain: must be a string, not a number"),
        ('{"text": "a", "domain": ""}', "domain: is empty"),
        ('{"text": "a", "kind": true}', "kind: must be a string, not true or false"),
        ('{"text": "a", "answer": {"a": 1}}', "answer: must be a string, a number or a list of strings, not an object"),
        ('{"text": "a", "answer": false}', "answer: must be a string, a number or a list of strings, not true or false"),
        ('{"text": "a", "answer": []}', "answer: as a list must hold at least one string"),
        ('{"text": "a", "answer": ["b", 1]}', "answer: as a list must hold at least one string, and strings only"),
        ('{"text": "a", "metadata": []}', "metadata: must be an object, not a list"),
    ],
)  # fmt: skip
def test_a_defect_is_named_with_file_line_and_field(jsonl, line, message):
    path = jsonl(GOOD, line)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: file: is empty"):
        read_rows(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(DataError, match="file: does not exist or is not a file"):
            read_rows(path)


def test_reading_needs_no_torch():
    code = (
        "import sys; import srde.data.rows; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_shared_data_is_read_whole(shared_data, split):
    for domain in DOMAINS:
        path = shared_data / f"{domain}.{split}.jsonl"
        rows = read_rows(path)
        assert len(rows) == path.read_bytes().count(b"\n")
        assert {row.domain for row in rows} == {domain}
        assert all(row.answer is not None and row.kind and row.license for row in rows)
