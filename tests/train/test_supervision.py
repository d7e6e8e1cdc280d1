"""Whose tokens are whose: several experts per domain take whole examples in turn, packed and padded."""

from collections import Counter

import pytest
import torch

from srde.errors import ConfigError
from srde.train.supervision import Supervision, domain_table

TABLE = ((0, 4), (1,), (2, 3, 5))


def padded(domains, lengths=None):
    """One example a row; padding has domain -1."""
    lengths = [4] * len(domains) if lengths is None else lengths
    longest = max(lengths)
    return torch.tensor([[d] * n + [-1] * (longest - n) for d, n in zip(domains, lengths, strict=True)])


def packed(domains, lengths):
    ids = [d for d, n in zip(domains, lengths, strict=True) for _ in range(n)]
    return torch.tensor([ids]), torch.tensor([[p for n in lengths for p in range(n)]])


def by_example(experts, lengths):
    """The expert of each example of a packed row, which must be one."""
    parts = experts[0].split(lengths)
    assert all(len(part.unique()) == 1 for part in parts)
    return [int(part[0]) for part in parts]


def test_without_a_table_domain_d_has_expert_d_modulo_their_number():
    domains = torch.tensor([[0, 1, 2, 3], [4, 7, -1, -1]])
    assert Supervision(9, 3).experts(domains).tolist() == [[0, 1, 2, 0], [1, 1, -1, -1]]
    assert Supervision(0, 4, table=()).experts(torch.full((2, 3), -1)).tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("turn", [0, 1, 17])
def test_examples_of_a_domain_go_to_its_experts_in_turn(turn):
    supervision = Supervision(9, 6, table=TABLE)
    domains = [0, 1, 2, 0, 2, 2, 1, 0, 2, 2, 0, -1]
    lengths = [3, 1, 4, 1, 5, 2, 6, 5, 3, 2, 1, 4]
    ids, positions = packed(domains, lengths)
    in_one_row = by_example(supervision.experts(ids, positions, turn), lengths)
    in_rows = supervision.experts(padded(domains), None, turn)
    assert in_one_row == in_rows[:, 0].tolist()
    assert all((row == row[0]).all() for row in in_rows)
    for domain, own in enumerate(TABLE):
        given = [e for d, e in zip(domains, in_one_row, strict=True) if d == domain]
        start = own.index(given[0])  # whoever is first, the next follow in order
        assert given == [own[(start + n) % len(own)] for n in range(len(given))]
    assert in_one_row[-1] == -1


def test_padding_changes_nobodys_turn():
    supervision = Supervision(9, 6, table=TABLE)
    domains, lengths = [0, 2, 0, 2, 1, 2, -1], [5, 3, 6, 2, 1, 4, 2]
    got = supervision.experts(padded(domains, lengths), None, 3)
    want = supervision.experts(padded(domains), None, 3)
    assert got[:, 0].tolist() == want[:, 0].tolist()
    for row, length in zip(got, lengths, strict=True):
        assert (row[:length] == row[0]).all() and (row[length:] == -1).all()


@pytest.mark.parametrize("period", range(1, 9))
def test_every_expert_of_a_domain_has_its_share_however_domains_alternate(period):
    """One example a step, and domain 0 comes every so many steps."""
    for count in (2, 3, 4):
        supervision = Supervision(999, count, table=(tuple(range(count)),))
        given = Counter(
            int(supervision.experts(torch.zeros(1, 3, dtype=torch.long), None, turn)[0, 0])
            for turn in range(0, 240 * period, period)
        )
        assert set(given) == set(range(count)) and min(given.values()) > 240 / count / 2


def test_a_table_says_what_was_given_and_otherwise_counts():
    names = ["math", "code", "logic"]
    assert domain_table(names, 2, None) == ((0,), (1,), (0,))
    assert domain_table(names, 8, ["logic=0,6", "code=2"]) == ((0,), (2,), (0, 6))
    assert domain_table([], 8, None) == ()


@pytest.mark.parametrize(
    "entry", ["math", "math=", "=1", "art=1", "math=1;2", "math=8", "math=-1", "math=a", "math=1,"]
)
def test_what_cannot_be_read_is_refused(entry):
    with pytest.raises(ConfigError) as raised:
        domain_table(["math", "code"], 8, ["code=1", entry])
    assert str(raised.value) == (
        f"domain_experts={entry!r}: an entry is a domain (math, code), '=' and experts from 0 to 7. "
        "write for example --domain_experts math=0,6 code=2."
    )
