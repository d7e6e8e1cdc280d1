"""Scores a plan for a blocks world by carrying it out.

A prompt of PlanBench says where the blocks are and what is to hold in the end; many plans may be right. `score_plan` reads
both, carries out the actions of an answer one by one, each with its preconditions, and says whether all were legal and the
goal holds after the last:

| action          | needs                                               | then                         |
|-----------------|-----------------------------------------------------|------------------------------|
| pick up x       | the hand empty, x clear and on the table            | the hand holds x             |
| unstack x from y| the hand empty, x clear and on y                    | the hand holds x, y is clear |
| put down x      | the hand holds x                                    | x is on the table            |
| stack x on y    | the hand holds x, y clear (so y is another block)   | x is on y                    |

A block is clear when nothing is on it and the hand does not hold it. Source: Valmeekam et al. 2023, PlanBench
(arXiv:2206.10498), domain `blocksworld_4ops`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TABLE, HAND = "(table)", "(hand)"  # where a block may be besides on another; no block's name has brackets

_BLOCK = r"(?:the\s+)?(?:block\s+(?:called\s+)?)?([\w-]+)(?:\s+block)?"
_FACTS = {
    "on": re.compile(rf"{_BLOCK}\s+is\s+on\s+top\s+of\s+{_BLOCK}", re.IGNORECASE),
    "table": re.compile(rf"{_BLOCK}\s+is\s+on\s+the\s+table", re.IGNORECASE),
    "clear": re.compile(rf"{_BLOCK}\s+is\s+clear", re.IGNORECASE),
    "empty": re.compile(r"(?:the|my)\s+hand\s+is\s+empty", re.IGNORECASE),
    "holding": re.compile(
        rf"(?:(?:the|my)\s+hand\s+is|I\s+am)\s+(?:currently\s+)?holding\s+{_BLOCK}", re.IGNORECASE
    ),
}
_WORLD_STARTS = re.compile(r"As\s+initial\s+conditions\s+I\s+have\s+that", re.IGNORECASE)
_WORLD = re.compile(
    _WORLD_STARTS.pattern + r"[,:]?\s*(?P<state>[^.]*)\.\s*"
    r"My\s+goal\s+is\s+(?:to\s+have\s+that|for\s+the\s+following\s+to\s+be\s+true)[,:]?\s*(?P<goal>[^.]*)\.",
    re.IGNORECASE,
)
_ACTIONS = {
    "pick-up": re.compile(rf"pick(?:s|ed|ing)?[\s-]?up\s+{_BLOCK}(?:\s+from\s+the\s+table)?", re.IGNORECASE),
    "unstack": re.compile(
        rf"unstack(?:s|ed|ing)?\s+{_BLOCK}\s+(?:from(?:\s+on\s+top\s+of|\s+the\s+top\s+of)?|off(?:\s+of)?)\s+{_BLOCK}",
        re.IGNORECASE,
    ),
    "put-down": re.compile(rf"put(?:s|ting)?[\s-]?down\s+{_BLOCK}(?:\s+on(?:to)?\s+the\s+table)?", re.IGNORECASE),
    "stack": re.compile(
        rf"stack(?:s|ed|ing)?\s+{_BLOCK}\s+(?:on(?:\s+top\s+of)?|onto|atop)\s+{_BLOCK}", re.IGNORECASE
    ),
}  # fmt: skip
_PDDL = re.compile(r"\(\s*(pick-up|put-down|unstack|stack)((?:\s+[\w-]+)*)\s*\)", re.IGNORECASE)
_OPERANDS = {"pick-up": 1, "put-down": 1, "unstack": 2, "stack": 2}
_SECTION = re.compile(r"\[PLAN\](.*?)(?:\[PLAN END\]|\[STATEMENT\]|\Z)", re.DOTALL | re.IGNORECASE)
_BEFORE_AN_ACTION = re.compile(
    r"\s*(?:[-*•>]+\s*|\(?(?:step\s+)?\d+\s*[.):-]*\s*|step\s+\d+\s*[.):-]*\s*|"
    r"(?:first|second|third|then|next|finally|lastly|and|i|we|now|will|should|can)\b[,:]?\s*)*",
    re.IGNORECASE,
)
_BETWEEN_ACTIONS = re.compile(
    r"[\n;]|\.(?=\s|\Z)|(?:,|\s(?:and|then)\b)\s*(?=(?:(?:and|then)\s+)*(?:pick|put|unstack|stack))",
    re.IGNORECASE,
)
_LOOKS_LIKE_AN_ACTION = re.compile(r"(?:pick\w*[\s-]?up|put\w*[\s-]?down|unstack\w*|stack)\b", re.IGNORECASE)

Action = tuple[str, ...]
"""`("pick-up", x)`, `("put-down", x)`, `("unstack", x, y)` or `("stack", x, y)`."""


@dataclass(frozen=True)
class World:
    """A task.

    Attributes:
        places: Block -> the block it is on, or `TABLE`, or `HAND`.
        goal: What is to hold: `("on", x, y)`, `("table", x)`, `("clear", x)`, `("holding", x)`, `("empty",)`.
    """

    places: dict[str, str]
    goal: frozenset[tuple[str, ...]]


def score_plan(text: str, prompt: str, answer: str) -> bool:
    """Whether a model's answer is a plan that works.

    Every line of the answer that is an action counts, in order: in words ("unstack the red block from on top of the blue
    block"), numbered or not, or as PDDL (`(unstack red blue)`). Where there is a `[PLAN]` section, only its lines count.
    Other lines are taken for prose, but a line that begins as an action and is none that can be read makes the plan wrong.

    Args:
        text: The model's answer.
        prompt: The task, as PlanBench puts it; of several, as in a prompt with examples, the last one counts.
        answer: The known plan. It is used where the prompt cannot be read: then the answer must be the same plan.
    """
    world = parse_world(prompt)
    actions = parse_plan(text)
    if world is None:
        return _plain(text) == _plain(answer) or (bool(actions) and actions == parse_plan(answer))
    if actions is None or (not actions and _plain(answer)):
        return False  # no plan at all is not one, even where nothing needs to be done
    return carry_out(world, actions)


def parse_world(prompt: str) -> World | None:
    """The last task of a prompt; None where there is none, or one that cannot be read or contradicts itself."""
    starts = [start.start() for start in _WORLD_STARTS.finditer(prompt)]
    found = _WORLD.match(prompt, starts[-1]) if starts else None
    if found is None:
        return None
    facts, goal = _facts(found["state"]), _facts(found["goal"])
    if facts is None or not goal:
        return None
    places: dict[str, str] = {}
    for kind, *blocks in sorted(facts):
        place = {"on": blocks[-1:], "table": [TABLE], "holding": [HAND]}.get(kind)
        if place:
            if blocks[0] in places:
                return None
            places[blocks[0]] = place[0]
    world = World(places, frozenset(goal))
    named = {block for _, *blocks in facts | goal for block in blocks}
    stated = {fact for fact in facts if fact[0] in ("clear", "empty")}
    supports = [place for place in places.values() if place != TABLE]
    consistent = (
        named <= set(places)
        and len(supports) == len(set(supports))  # one block on each block, and one in the hand
        and all(_stands(places, block) for block in places)
        and stated == {fact for fact in _holding(places) if fact[0] in ("clear", "empty")}
    )
    return world if consistent else None


def parse_plan(text: str) -> list[Action] | None:
    """The actions of an answer in order; None if a line begins as an action and cannot be read as one."""
    section = _SECTION.search(text)
    body = section[1] if section else re.split(r"\[PLAN END\]", text, flags=re.IGNORECASE)[0]
    actions: list[Action] = []
    for line in _BETWEEN_ACTIONS.split(body):
        symbolic = list(_PDDL.finditer(line))
        for one in symbolic:
            name, blocks = one[1].lower(), one[2].lower().split()
            if len(blocks) != _OPERANDS[name]:
                return None
            actions.append((name, *blocks))
        if symbolic:
            continue
        rest = line[_BEFORE_AN_ACTION.match(line).end() :].strip(" \t\r`*_.,:!")  # type: ignore[union-attr]
        if not _LOOKS_LIKE_AN_ACTION.match(rest):
            continue
        for name, pattern in _ACTIONS.items():
            if whole := pattern.fullmatch(rest):
                actions.append((name, *(block.lower() for block in whole.groups())))
                break
        else:
            return None
    return actions


def carry_out(world: World, actions: list[Action]) -> bool:
    """Whether all actions are legal, one after the other, and the goal holds after the last."""
    places = dict(world.places)
    for name, *blocks in actions:
        block, other = blocks[0], blocks[-1]
        facts = _holding(places)
        needs: dict[str, set[tuple[str, ...]]] = {
            "pick-up": {("empty",), ("clear", block), ("table", block)},
            "unstack": {("empty",), ("clear", block), ("on", block, other)},
            "put-down": {("holding", block)},
            "stack": {("holding", block), ("clear", other)},
        }
        if not needs[name] <= facts:
            return False
        places[block] = {"put-down": TABLE, "stack": other}.get(name, HAND)
    return world.goal <= _holding(places)


def _holding(places: dict[str, str]) -> set[tuple[str, ...]]:
    """All facts of a state."""
    facts: set[tuple[str, ...]] = set()
    covered = set(places.values())
    for block, place in places.items():
        facts.add(
            ("table", block)
            if place == TABLE
            else ("holding", block)
            if place == HAND
            else ("on", block, place)
        )
        if block not in covered and place != HAND:
            facts.add(("clear", block))
    if HAND not in covered:
        facts.add(("empty",))
    return facts


def _stands(places: dict[str, str], block: str) -> bool:
    """Whether a block is, in the end, on the table or alone in the hand: no tower of blocks hangs in a circle."""
    if places[block] == HAND:
        return block not in places.values()
    for _ in places:
        if places.get(block, TABLE) == TABLE:
            return block in places
        block = places[block]
    return False


def _facts(text: str) -> set[tuple[str, ...]] | None:
    """The facts of a list in words; None if one cannot be read."""
    facts: set[tuple[str, ...]] = set()
    for clause in re.split(r",\s*(?:and\s+)?|\s+and\s+|\n", text):
        if not clause.strip():
            continue
        for kind, pattern in _FACTS.items():
            if whole := pattern.fullmatch(clause.strip()):
                facts.add((kind, *(block.lower() for block in whole.groups())))
                break
        else:
            return None
    return facts


def _plain(text: str) -> list[str]:
    """The lines that are not empty, in lower case, with single spaces."""
    return [" ".join(line.lower().split()) for line in text.split("\n") if line.strip()]
