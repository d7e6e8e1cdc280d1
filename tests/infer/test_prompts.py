"""Prompts from files and texts: templates, lengths, batches, and folders by the names that users give."""

import json

import pytest

from srde.errors import ArtifactError, ConfigError, DataError
from srde.hub.open import adapter_folder
from srde.infer.prompt_files import read_prompts
from srde.infer.prompts import batches, check_lengths, encode_prompt
from tiny import CHAT_TEMPLATE, tiny, tiny_tokenizer


def test_a_system_text_goes_in_front_unless_there_is_one():
    tokenizer = tiny_tokenizer()
    user = {"role": "user", "content": "yes"}
    want = tokenizer(
        "<|im_start|>system\nno<|im_end|>\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_prompt(tokenizer, "yes", system="no") == want["input_ids"]
    own = [{"role": "system", "content": "no"}, user]
    assert encode_prompt(tokenizer, own, system="other") == want["input_ids"]


def test_raw_is_the_text_itself():
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, "yes 1", raw=True) == tokenizer("yes 1")["input_ids"]
    with pytest.raises(ConfigError, match="raw=True: what is continued as it is must be a text"):
        encode_prompt(tokenizer, "yes", raw=True, system="no")
    with pytest.raises(ConfigError, match="prompt='': it gives no token to start from"):
        encode_prompt(tokenizer, "", raw=True)


def test_a_template_that_refuses_is_quoted():
    tokenizer = tiny_tokenizer("{{ raise_exception('System role not supported') }}" + CHAT_TEMPLATE)
    with pytest.raises(ConfigError, match="chat template refuses it: System role not supported"):
        encode_prompt(tokenizer, "yes", system="no")


def test_a_prompt_must_leave_room_for_its_answer():
    model = tiny(max_position_embeddings=16)
    check_lengths(model, [[1] * 8], 8)
    with pytest.raises(
        ConfigError, match="prompt's tokens=9: with max_new_tokens=8 they exceed the model's 16"
    ):
        check_lengths(model, [[1] * 4, [1] * 9], 8)


def test_batches_are_of_similar_length_and_in_order():
    got = batches([1, 9, 2, 8, 3], 2)
    assert sorted(map(sorted, got)) == [[0], [1, 3], [2, 4]] and [min(b) for b in got] == [0, 1, 2]
    assert batches([3, 1, 3], 1) == [[0], [1], [2]]
    assert sorted(batches([3, 1, 3, 1], 8, even=True)) == [[0, 2], [1, 3]]
    with pytest.raises(ConfigError, match="batch_size=0: a batch has at least 1 prompt"):
        batches([1], 0)


def test_a_file_of_rows_or_of_lines(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\u2028b"}]
    rows = [
        {"prompt": "one", "response": "1"},
        {"messages": [*turns, {"role": "assistant", "content": "x"}]},
        {"messages": turns},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_prompts(tmp_path / "a.jsonl") == ["one", turns, turns]
    (tmp_path / "a.txt").write_text("one\n\n  zwei é\r\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "zwei é"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: file: is empty; it must hold at least one prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}', 'a.jsonl:2: row: must have exactly one of "prompt" and "messages"'),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1: prompt: must be a text that is not empty"),
        ("a.jsonl", b'{"messages": ["a"]}', 'a.jsonl:1: messages: must be a list of {"role": text, "content": text}'),
        ("a.jsonl", b'{"messages": [{"role": "system", "content": "a"}]}', "a.jsonl:1: messages: must end in a question"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1: messages: must end in a question"),
        ("a.jsonl", b"{", "a.jsonl:1: row: is not JSON"),
        ("a.txt", b"a\n\xff", "a.txt:2: prompt: is not UTF-8: byte 0xff at column 1"),
    ],
)  # fmt: skip
def test_a_defect_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="file: does not exist"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_file_in_an_adapters_folder_means_the_folder(tmp_path):
    folder = tmp_path / "checkpoint-100"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for name in ("srde_weights.pt", "adapter_model.safetensors", "adapter_config.json"):
        assert adapter_folder(str(folder / name)) == str(folder)
    assert (
        adapter_folder(str(folder)) == str(folder) and adapter_folder("someone/adapter") == "someone/adapter"
    )
    (folder / "srde_weights.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ArtifactError, match=r"an old file of weights is a pickle.*srde import"):
        adapter_folder(str(folder / "srde_weights.pt"))
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ArtifactError, match=r"this file is not in a folder with an adapter_config\.json"):
        adapter_folder(str(tmp_path / "notes.txt"))
