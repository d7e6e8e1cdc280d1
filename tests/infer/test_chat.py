"""Conversations: turns, routes, a full context, answers broken off; and the loop that drives them from a terminal or a pipe."""

import io
import json
from contextlib import closing

import pytest
from adapters import config, fill
from peft import get_peft_model
from rich.console import Console

from srde.errors import ConfigError, UsageError
from srde.infer.chat import Chat
from srde.infer.generate import generate
from srde.infer.prompt_files import read_prompts
from srde.infer.prompts import encode_prompt
from srde.infer.route import routed
from srde.infer.settings import Settings
from srde.infer.terminal import COMMANDS, Terminal
from tiny import VOCABULARY, tiny, tiny_tokenizer

SHORT = Settings(max_new_tokens=6)


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.fixture
def chat(named):
    return Chat(*named, SHORT, system="no")


def test_each_answer_is_that_of_the_whole_conversation(named, chat):
    model, tokenizer = named
    first = text_of(chat.say("what is 1"))
    second = text_of(chat.say("how many"))
    assert [t["role"] for t in chat.turns] == ["user", "assistant"] * 2
    turns = [{"role": "system", "content": "no"}, *chat.turns]
    assert first == generate(model, tokenizer, [turns[:2]], max_new_tokens=6).answers[0].text
    assert (
        second
        == generate(model, tokenizer, [turns[:4]], max_new_tokens=6).answers[0].text
        == turns[4]["content"]
    )
    assert first != second and chat.answer.text == second


def test_asking_again_with_another_route_replaces_the_answer(named, chat):
    model, tokenizer = named
    said = text_of(chat.say("what is 1"))
    chat.set_route("off")
    off = text_of(chat.again())
    with routed(model, "off"):
        assert off == generate(model, tokenizer, ["what is 1"], max_new_tokens=6, system="no").answers[0].text
    assert off != said and len(chat.turns) == 2 and chat.turns[1]["content"] == off
    chat.set_route()
    assert text_of(chat.again()) == said


def test_an_unknown_route_leaves_the_present_one(chat):
    chat.set_route("code")
    with pytest.raises(ConfigError, match="expert='maths'"):
        chat.set_route("maths")
    with pytest.raises(ConfigError, match="expert=9"):
        chat.set_route(expert=9)
    assert chat.route == ("code", None) and {p.expert for p in chat.say("yes")} == {1}


def test_an_answer_that_is_broken_off_stays_as_far_as_it_got(chat):
    with closing(chat.say("what is 1")) as pieces:
        text = next(pieces).text + next(pieces).text
    assert chat.turns[1] == {"role": "assistant", "content": text} and chat.answer.new_tokens < 6
    assert chat.analyse().answer.texts and text_of(chat.say("yes")) is not None and len(chat.turns) == 4


def test_an_analysis_is_of_the_answer_as_it_was_made(chat):
    chat.set_route("logic")
    text_of(chat.say("yes"))
    chat.set_route("off")
    assert chat.analyse().answer.load_E.tolist() == [0, 0, 0, 1] and chat.route == ("off", None)
    text_of(chat.again())
    with pytest.raises(UsageError, match="no adapter is active"):
        chat.analyse()


def test_a_question_that_fails_does_not_stay(named, chat):
    text_of(chat.say("yes"))
    with (
        named[0].srde.force_experts([0, 1, 2, 3, 0, 1, 2]),
        pytest.raises(UsageError, match="this layer sees"),
    ):
        text_of(chat.say("no"))
    assert len(chat.turns) == 2 and chat.analyse().answer.texts
    assert text_of(chat.say("no")) == chat.turns[3]["content"]


def small_chat(positions):
    tokenizer = tiny_tokenizer()
    base = tiny(
        vocab_size=VOCABULARY, eos_token_id=2, initializer_range=0.3, max_position_embeddings=positions
    )
    return Chat(fill(get_peft_model(base, config())).eval(), tokenizer, SHORT)


def test_a_full_context_drops_the_oldest_and_keeps_what_fits():
    chat = small_chat(60)
    for question in ("what is 1", "what is 2", "what is 3", "what is 4"):
        text_of(chat.say(question))
    assert chat.forgotten > 0 and chat.forgotten % 2 == 0 and len(chat.turns) == 8
    shown = [*chat.turns[chat.forgotten : -1]]
    assert len(encode_prompt(chat.tokenizer, shown)) + 6 <= 60
    more = chat.turns[chat.forgotten - 2 : -1]
    assert len(encode_prompt(chat.tokenizer, more)) + 6 > 60
    want = generate(chat.model, chat.tokenizer, [shown], max_new_tokens=6).answers[0].text
    assert chat.turns[-1]["content"] == want


def test_a_question_that_alone_does_not_fit_is_refused_and_forgets_nothing():
    chat = small_chat(60)
    text_of(chat.say("what is 1"))
    with pytest.raises(ConfigError, match="they exceed the model's 60 positions"):
        text_of(chat.say("9 " * 60))
    assert len(chat.turns) == 2 and chat.forgotten == 0


def test_before_the_first_question_there_is_nothing_to_do(chat, tmp_path):
    for call in (chat.again, chat.analyse, lambda: chat.save(tmp_path / "a.jsonl")):
        with pytest.raises(UsageError, match="ask something first"):
            call()


def test_a_saved_conversation_is_a_row_that_can_be_asked(chat, tmp_path):
    text_of(chat.say("what is 1"))
    chat.save(tmp_path / "a.jsonl")
    turns = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert turns == [{"role": "system", "content": "no"}, *chat.turns]
    assert read_prompts(tmp_path / "a.jsonl") == [turns[:2]]
    with pytest.raises(UsageError, match="it cannot be written"):
        chat.save(tmp_path / "no/such/folder" / ("x" * 300))


# ---- the loop ------------------------------------------------------------------------------------------------------------


class Keys:
    """Lines as they are typed; an exception is raised in its turn."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line


def talk(chat, *lines, interactive=True, routing=False):
    out = io.StringIO()
    console = Console(file=out, width=100, color_system=None, highlight=False, markup=False)
    terminal = Terminal(chat, console, Keys(*lines), interactive=interactive, routing=routing)
    return terminal.run(), out.getvalue()


def test_a_pipe_gets_the_answers_and_nothing_else(named, chat, capsys):
    status, out = talk(chat, "what is 1", "", "/route off", "/regenerate", interactive=False)
    texts = []
    for route in (None, "off"):
        with routed(named[0], route):
            texts += [a.text for a in generate(*named, ["what is 1"], max_new_tokens=6, system="no")]
    assert status == 0 and out == "".join(text + "\n" for text in texts)
    assert capsys.readouterr().err == "the base speaks\n"


def test_in_a_pipe_the_first_error_ends_it_and_at_a_keyboard_it_does_not(chat):
    with pytest.raises(
        ConfigError, match=r"command='/rotue': there is no such command\. the nearest is /route"
    ):
        talk(chat, "/rotue math", "yes", interactive=False)
    status, out = talk(chat, "/rotue math", "/expert x", "/routing", "/save", "/bogus!", "yes")
    assert status == 0 and len(chat.turns) == 2
    for message in ("nearest is /route", "expert='x': it must be a number", "routing='': it must be on or off",
                    "file='': a conversation needs a file", "/help lists them"):  # fmt: skip
        assert message in out


def test_every_command_does_what_help_says(chat, tmp_path):
    file = tmp_path / "c.jsonl"
    status, out = talk(
        chat, "/help", "/route code", "/routing on", "yes", "/routing off", "/expert 3", "/regenerate", "/analysis",
        f"/save {file}", "/system be brief", "/reset", "//slash", "/system", "/exit", "never asked",
    )  # fmt: skip
    assert status == 0
    for command in COMMANDS:
        assert command in out
    assert "[1]" in out and "experts:  [1] code" in out and "expert 3 logic speaks" in out
    assert (
        "■ 3 logic │  100 % │  100 %" in out
        and json.loads(file.read_text())["messages"][1]["content"] == "yes"
    )
    assert (
        [t["content"] for t in chat.turns][:1] == ["/slash"] and chat.system is None and len(chat.turns) == 2
    )


def test_a_full_context_is_said():
    _, out = talk(small_chat(60), "what is 1", "what is 2", "what is 3", "what is 4")
    assert "The context is full: the model no longer sees the oldest" in out


class Interrupting(Chat):
    """Ctrl-C comes with the second piece of each answer."""

    def say(self, text):
        with closing(super().say(text)) as pieces:
            yield next(pieces)
            raise KeyboardInterrupt


def test_ctrl_c_stops_the_answer_and_twice_leaves(named):
    chat = Interrupting(*named, SHORT)
    status, out = talk(chat, "what is 1", "yes", KeyboardInterrupt(), "never asked")
    assert status == 130 and out.count("stopped; Ctrl-C again leaves") == 2
    assert [t["role"] for t in chat.turns] == ["user", "assistant"] * 2 and chat.turns[1]["content"]
    status, out = talk(Chat(*named, SHORT), KeyboardInterrupt(), "yes", KeyboardInterrupt())
    assert status == 0 and out.count("Ctrl-C again leaves, and so does /exit") == 2
