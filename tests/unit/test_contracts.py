"""Components that break a law are stopped: kind, name, layer and law are in the sentence, whatever they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from dernkit.api import CheckpointError, ContractError, KeepLimits, Match, RecipeError, Retention, Subject
from dernkit.builtin.assigners import Affinity
from dernkit.kernel import calls
from dernkit.kernel.contracts import LAWS, LAWS_OF, SEEN, Call
from dernkit.testing.banks import random_bank, random_pool, random_stats, retained
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats

EXPERTS, WIDTH, HIDDEN, LAYER = 4, 5, 3, 7
Deed = Callable[..., Any]


@dataclass(frozen=True)
class Actor:
    """A component of every kind that does what it is told."""

    deed: Deed
    name: ClassVar[str] = "actor"
    requires: ClassVar[frozenset[str]] = frozenset({"routed"})
    widens: ClassVar[bool] = False
    groups: ClassVar[bool] = True
    needs_groups: ClassVar[bool] = False
    needs_measures: ClassVar[bool] = True
    filename: ClassVar[str] = "actor.txt"

    def _do(self, *inputs: Any) -> Any:
        return self.deed(*inputs)

    score = measure = select = assign = match = pairs = merge = update = refit = tokens = evaluate = render = _do

    def allocate(self, measures: Any, keep: Any, limits: Any) -> Any:
        return self.deed(measures, keep, limits)


def bank() -> ExpertBank:
    return random_bank(EXPERTS, WIDTH, HIDDEN, layer=LAYER)


def stats(whose: ExpertBank) -> LayerStats:
    return random_stats(whose)


def scores() -> torch.Tensor:
    return torch.tensor([4, 1, 3, 2], dtype=torch.float64)


def plan() -> LayerPlan:
    return LayerPlan(LAYER, EXPERTS, WIDTH, scores(), torch.tensor([0, 2]), good_moves())


def good_moves() -> Assignment:
    return Assignment(torch.tensor([5, 16]), torch.tensor([0, 1]), torch.tensor([4, 0]), torch.tensor([0.5, 0.25]))


def with_moves(**columns: Any) -> Assignment:
    """Good moves with another column, past the annotations that are enforced in tests."""
    return past(good_moves(), **columns)


def past(record: Any, **values: Any) -> Any:
    for name, value in values.items():
        object.__setattr__(record, name, value)
    return record


def do_score(actor: Actor) -> Any:
    return calls.score(actor, bank(), stats(bank()))


def do_measure(actor: Actor) -> Any:
    return calls.measure(actor, bank(), scores(), stats(bank()))


def do_allocate(actor: Actor) -> Any:
    limits = [KeepLimits(layer, EXPERTS, 2, 2) for layer in (3, LAYER)]
    return calls.allocate(actor, [scores(), scores()], 0.5, limits)


def do_select(actor: Actor) -> Any:
    return calls.select(actor, bank(), scores(), 2, stats(bank()))


def do_assign(actor: Actor) -> Any:
    return calls.assign(actor, bank(), retained(bank(), [0, 2]), stats(bank()))


def do_match(actor: Actor) -> Any:
    return calls.match(actor, bank(), 1, torch.tensor([0, 2]), stats(bank()))


def do_pairs(actor: Actor) -> Any:
    return calls.pairs(actor, bank(), 1, 2, stats(bank()))


def do_merge(actor: Actor) -> Any:
    pool = random_pool(WIDTH, 3, features=HIDDEN, stats=stats(bank()).only(actor.requires))
    return calls.merge(actor, pool, WIDTH, torch.Generator(), LAYER)


def do_update(actor: Actor) -> Any:
    return calls.update(actor, torch.ones(EXPERTS, HIDDEN), plan(), stats(bank()))


def do_refit(actor: Actor) -> Any:
    return calls.refit(actor, bank(), random_bank(2, WIDTH, HIDDEN, layer=LAYER), plan(), stats(bank()))


def do_tokens(actor: Actor) -> Any:
    return calls.tokens(actor, None, 2, 8, torch.Generator())


def do_evaluate(actor: Actor) -> Any:
    return calls.evaluate(actor, Subject(None, None, Path()))


def do_render(actor: Actor) -> Any:
    return calls.render(actor, {"recipe": {"name": "x"}, "sizes": []})


GOOD_MATCH = (torch.zeros(WIDTH, 2), torch.zeros(WIDTH, 2, dtype=torch.int64))


def matched(affinity: Any = GOOD_MATCH[0], partner: Any = GOOD_MATCH[1]) -> Any:
    return past(Match(*GOOD_MATCH), affinity=affinity, partner=partner)


def kept(*experts: int, **values: Any) -> Any:
    return past(retained(bank(), [0, 2]), **{"scores": scores(), "kept": torch.tensor(experts)} | values)


def good_groups(given: torch.Tensor) -> Retention:
    return Retention(given, torch.tensor([0, 2]), torch.tensor([0, 0, 1, -1]))


DO: Mapping[str, tuple[str, Callable[[Actor], Any], Deed]] = {
    "score": ("scorer", do_score, lambda bank, stats: scores()),
    "measure": ("budget", do_measure, lambda *inputs: torch.empty(0)),
    "allocate": ("budget", do_allocate, lambda *inputs: [2, 4]),
    "select": ("selector", do_select, lambda bank, scores, count, stats: good_groups(scores)),
    "assign": ("assigner", do_assign, lambda *inputs: good_moves()),
    "match": ("similarity", do_match, lambda *inputs: matched()),
    "pairs": ("similarity", do_pairs, lambda *inputs: torch.zeros(WIDTH, WIDTH)),
    "merge": ("merge", do_merge, lambda pool, width, rng: pool.own + torch.rand(1, generator=rng)),
    "update": ("router", do_update, lambda rows, plan, stats: rows[plan.kept]),
    "refit": ("refit", do_refit, lambda bank, after, plan, stats: after.down.to(torch.float32, copy=True)),
    "tokens": ("source", do_tokens, lambda tokenizer, sequences, length, rng: torch.ones(2, 8, dtype=torch.int64)),
    "evaluate": ("evaluator", do_evaluate, lambda subject: {"loss": 1.5, "tokens": 3}),
    "render": ("report", do_render, lambda run: "text"),
}
"""Method -> kind, the call with good inputs, what a good component does."""


def everywhere(law: str, deed: Deed, got: str, *methods: str) -> list[tuple[str, str, Deed, str]]:
    return [(method, law, deed, got) for method in methods or DO]


def undeclared(*inputs: Any) -> Any:
    return (inputs[0].stats if len(inputs) == 3 and hasattr(inputs[0], "stats") else inputs[-1])["gate_sum"]


def changed(where: Callable[..., torch.Tensor]) -> Deed:
    """Changes one tensor of the inputs; what it returns is never looked at."""
    return lambda *inputs: where(*inputs).mul_(2)


NAN = torch.tensor(float("nan"), dtype=torch.float64)
WITH_STATS = ("score", "measure", "select", "assign", "match", "pairs", "merge", "update", "refit")
BREAKS = [
    *everywhere("no_exception", lambda *inputs: 1 // 0, "ZeroDivisionError: .* at test_contracts.py:"),
    *everywhere("no_exception", lambda *inputs: exit(3), "SystemExit: 3"),
    *everywhere("type", lambda *inputs: None, "nothing"),
    *everywhere("type", lambda *inputs: np.ones(EXPERTS), "a numpy ndarray"),
    *everywhere("type", lambda *inputs: (1.0, 2.0), "a tuple", "score", "select", "match", "merge", "evaluate"),
    *everywhere("only_declared_statistics", undeclared, "only routed", *WITH_STATS),
    ("score", "no_mutation", changed(lambda bank, stats: stats["routed"]), "'stats.routed' changed"),
    ("measure", "no_mutation", changed(lambda bank, scores, stats: scores), "'scores' changed"),
    ("allocate", "no_mutation", changed(lambda measures, keep, limits: measures[1]), "'measures.1' changed"),
    ("allocate", "no_mutation", lambda measures, keep, limits: limits.pop(), "'limits.1.layer' changed"),
    ("select", "no_mutation", changed(lambda bank, scores, count, stats: scores), "'scores' changed"),
    ("assign", "no_mutation", changed(lambda bank, found, stats: found.scores), "'retention.scores' changed"),
    ("match", "no_mutation", changed(lambda bank, dropped, kept, stats: kept), "'kept' changed"),
    ("pairs", "no_mutation", changed(lambda bank, dropped, other, stats: bank.gate), "'bank.gate' changed"),
    ("merge", "no_mutation", changed(lambda pool, width, rng: pool.incoming), "'pool.incoming' changed"),
    ("merge", "no_mutation", lambda pool, width, rng: past(pool, own_weight=1.0), "'pool.own_weight' changed"),
    ("update", "no_mutation", changed(lambda rows, plan, stats: rows), "'rows' changed"),
    ("update", "no_mutation", changed(lambda rows, plan, stats: plan.assignment.target), "'plan.assignment.target'"),
    ("refit", "no_mutation", changed(lambda bank, after, plan, stats: after.down), "'after.down' changed"),
    ("evaluate", "no_mutation", lambda subject: past(subject, path=Path("x")), "'subject.path' changed"),
    ("render", "no_mutation", lambda run: run["recipe"].update(more=1), "'run.recipe.more' changed"),
    ("score", "shape", lambda *_: scores()[:3], r"float64 \[3\] on cpu"),
    ("score", "dtype", lambda *_: scores().float(), r"float32 \[4\] on cpu"),
    ("score", "finite", lambda *_: scores() * NAN, r"nan at \[0\]"),
    ("measure", "finite", lambda *_: torch.tensor([[1.0], [torch.inf]]), r"inf at \[1, 0\]"),
    ("allocate", "type", lambda *_: torch.tensor([2, 4]), r"int64 \[2\] on cpu"),
    ("allocate", "type", lambda *_: [2, 4.0], "a float"),
    ("allocate", "in_range", lambda *_: [2], "1 instead"),
    ("allocate", "in_range", lambda *_: [2, 6], "6 instead"),
    ("allocate", "in_range", lambda *_: [2, 3], "3 instead"),
    ("select", "shape", lambda *_: kept(0, 1, 2), r"int64 \[3\] on cpu"),
    ("select", "dtype", lambda *_: kept(kept=torch.tensor([0.0, 1.0])), r"float32 \[2\] on cpu"),
    ("select", "in_range", lambda *_: kept(0, 4), r"\[0, 4\]"),
    ("select", "in_range", lambda *_: kept(2, 0), r"\[2, 0\]"),
    ("select", "in_range", lambda *_: kept(-1, 0), r"\[-1, 0\]"),
    ("select", "keeps_scores", lambda *_: kept(0, 2, scores=scores() + 1), "others"),
    ("select", "groups_as_said", lambda *_: kept(0, 2), "none"),
    ("select", "own_group", lambda *_: kept(0, 2, group=torch.tensor([1, 0, 0, -1])), r"\[1, 0\]"),
    ("select", "in_range", lambda *_: kept(0, 2, group=torch.tensor([0, 2, 1, -1])), r"2 at \[1\]"),
    ("select", "shape", lambda *_: kept(0, 2, group=torch.tensor([0, 1])), r"int64 \[2\]"),
    ("assign", "shape", lambda *_: with_moves(target=torch.tensor([0])), r"int64 \[1\] on cpu"),
    ("assign", "dtype", lambda *_: with_moves(source=torch.tensor([5.0, 6.0])), r"float32 \[2\] on cpu"),
    ("assign", "dtype", lambda *_: with_moves(affinity=torch.tensor([1, 2])), r"int64 \[2\] on cpu"),
    ("assign", "finite", lambda *_: with_moves(affinity=NAN.expand(2)), r"nan at \[0\]"),
    ("assign", "in_range", lambda *_: with_moves(source=torch.tensor([5, 20])), r"20 at \[1\]"),
    ("assign", "in_range", lambda *_: with_moves(source=torch.tensor([5, 0])), r"dropped expert.* Got 0 at \[1\]"),
    ("assign", "in_range", lambda *_: with_moves(target=torch.tensor([2, 0])), r"2 at \[0\]"),
    ("assign", "in_range", lambda *_: with_moves(partner=torch.tensor([-1, 0])), r"-1 at \[0\]"),
    ("assign", "dtype", lambda *_: with_moves(left=torch.tensor([0.0])), r"float32 \[1\]"),
    (
        "assign",
        "in_range",
        lambda *_: with_moves(left=torch.tensor([1, 5])),
        r"segments of kept experts.* Got 5 at \[1\]",
    ),
    ("assign", "in_range", lambda *_: with_moves(left=torch.tensor([2, 1])), r"ascending.* Got 1 at \[1\]"),
    ("assign", "in_range", lambda *_: with_moves(left=torch.tensor([4])), r"does not leave behind.* Got 4 at \[0\]"),
    ("match", "shape", lambda *_: matched(GOOD_MATCH[0][:, :1]), r"float32 \[5, 1\]"),
    ("match", "dtype", lambda *_: matched(partner=GOOD_MATCH[0]), r"float32 \[5, 2\]"),
    ("match", "finite", lambda *_: matched(GOOD_MATCH[0] / 0), r"nan at \[0, 0\]"),
    ("match", "in_range", lambda *_: matched(partner=GOOD_MATCH[1] + WIDTH), r"5 at \[0, 0\]"),
    ("pairs", "shape", lambda *_: torch.ones(WIDTH), r"float32 \[5\]"),
    ("pairs", "finite", lambda *_: torch.full((WIDTH, WIDTH), torch.inf), r"inf at \[0, 0\]"),
    ("merge", "shape", lambda pool, *_: torch.cat([pool.own, pool.own]), r"\[up to 5, 3, 3\].* Got \[10, 3, 3\]"),
    ("merge", "shape", lambda pool, *_: pool.own[:, :2], r"\[5, 2, 3\]"),
    ("merge", "shape", lambda pool, *_: pool.own.flatten(1), r"\[5, 9\]"),
    ("merge", "dtype", lambda pool, *_: pool.own.double(), r"float64 \[5, 3, 3\]"),
    ("merge", "finite", lambda pool, *_: pool.own * float("nan"), r"nan at \[0, 0, 0\]"),
    ("update", "shape", lambda rows, *_: rows * 1, r"float32 \[4, 3\]"),
    ("update", "dtype", lambda rows, *_: rows[:2].half(), r"float16 \[2, 3\]"),
    ("update", "finite", lambda rows, *_: rows[:2] / 0, r"inf at \[0, 0\]"),
    ("refit", "shape", lambda bank, *_: bank.down * 1, r"float32 \[4, 3, 5\]"),
    ("refit", "dtype", lambda bank, after, *_: after.down.half(), r"float16 \[2, 3, 5\]"),
    ("refit", "finite", lambda bank, after, *_: after.down / 0, r"inf at \[0, "),
    ("tokens", "shape", lambda *_: torch.ones(2, 7, dtype=torch.int64), r"int64 \[2, 7\]"),
    ("tokens", "dtype", lambda *_: torch.ones(2, 8), r"float32 \[2, 8\]"),
    ("evaluate", "type", lambda subject: {"loss": "low"}, "a str"),
]


@pytest.mark.parametrize("method", DO)
def test_a_component_that_keeps_the_laws_is_heard(method: str) -> None:
    _, do, deed = DO[method]
    assert do(Actor(deed)) is not None


@pytest.mark.parametrize(
    ("method", "law", "deed", "got"), BREAKS, ids=[f"{method}-{law}-{n}" for n, (method, law, *_) in enumerate(BREAKS)]
)
def test_a_component_that_breaks_a_law_is_named_with_the_law_and_the_layer(
    method: str, law: str, deed: Deed, got: str
) -> None:
    kind, do, _ = DO[method]
    with pytest.raises(ContractError, match=got) as caught:
        do(Actor(deed))
    error = caught.value
    assert (error.kind, error.component, error.law) == (kind, "actor", law)
    assert str(error).startswith(f"{kind} 'actor'{'' if error.layer is None else f', layer {LAYER}'}: ")
    assert f"(law {law})" in str(error) or law == "only_declared_statistics"
    assert "\n" not in str(error)


def test_every_law_of_every_kind_has_a_component_that_breaks_it() -> None:
    broken = {(DO[method][0], law) for method, law, _, _ in BREAKS}
    # A source's inputs are a tokenizer, two numbers and a generator; adapters are called in test_contracts_command.
    unseen = {("source", "no_mutation"), ("adapter", "no_exception")}
    assert broken | unseen == {(kind, law) for kind, laws in LAWS_OF.items() for law in laws}
    assert {law for laws in LAWS_OF.values() for law in laws} == set(LAWS)


@pytest.mark.parametrize("method", DO)
def test_the_layer_is_named_where_there_is_one(method: str) -> None:
    with pytest.raises(ContractError) as caught:
        DO[method][1](Actor(lambda *inputs: 1 // 0))
    assert caught.value.layer == (None if method in ("allocate", "tokens", "evaluate", "render") else LAYER)


def test_a_count_that_is_not_allowed_is_named_with_its_layer() -> None:
    with pytest.raises(
        ContractError, match=r"^budget 'actor', layer 7: a count must be from 2 to 4 in steps of 2"
    ) as caught:
        do_allocate(Actor(lambda *inputs: [2, 3]))
    assert caught.value.layer == LAYER


def big_bank() -> ExpertBank:
    """Tensors far above what is compared entry by entry."""
    found = random_bank(4, 64, 32, layer=LAYER, bias=True, dtype=torch.bfloat16)
    assert found.up.numel() > SEEN
    return found


WRITES: Mapping[str, Callable[[ExpertBank], Any]] = {
    "an in-place operation on one entry": lambda bank: bank.up[3, 5, 1].add_(1),
    "an assignment to one entry": lambda bank: bank.down.__setitem__((0, 0, 0), 9.0),
    "a view": lambda bank: bank.down.transpose(1, 2)[1].mul_(1.5),
    "out=": lambda bank: torch.mul(bank.up, 2, out=bank.up),
    "a detached alias": lambda bank: bank.gate.detach()[0].zero_(),
    "all of it past torch's counter": lambda bank: bank.gate.data.mul_(2),
    "all of it through numpy": lambda bank: bank.up.view(torch.int16).numpy().__ixor__(1),
    "one entry of a small tensor past torch's counter": lambda bank: bank.router.data[1, 1].add_(1),
    "a correction bias": lambda bank: bank.per_expert["correction_bias"].sub_(1),
    "a dictionary entry": lambda bank: bank.per_expert.update(correction_bias=torch.zeros(4)),
    "a new dictionary entry": lambda bank: bank.per_expert.update(mine=torch.zeros(4)),
    "a shape": lambda bank: bank.up.unsqueeze_(0),
    "a field of the frozen record": lambda bank: object.__setattr__(bank, "up", bank.up.clone()),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_change_of_the_bank_is_seen_whatever_the_way(write: str) -> None:
    actor = Actor(lambda bank, stats: [WRITES[write](bank), scores()][1])
    whole = big_bank()
    with pytest.raises(
        ContractError, match=r"layer 7: score must not change its input \(law no_mutation\)\. Got 'bank\."
    ):
        calls.score(actor, whole, random_stats(whole))


def test_reading_writing_to_copies_and_routing_change_nothing() -> None:
    def deed(bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
        copy = bank.segments(1)
        copy.zero_()
        assert bank.route is not None
        bank.route(torch.ones(2, 32), torch.tensor([0, 1, 3]))
        bank.output(0, torch.ones(2, 32))
        return stats["routed"] * 2

    whole = big_bank()
    assert torch.equal(calls.score(Actor(deed), whole, random_stats(whole)), random_stats(whole)["routed"] * 2)


def test_nan_in_an_input_is_no_change() -> None:
    whole = bank()
    whole.up[0, 0, 0] = float("nan")
    assert torch.equal(calls.score(Actor(lambda bank, stats: scores()), whole, stats(whole)), scores())


def test_tensors_of_inference_mode_are_compared_by_their_entries() -> None:
    with torch.inference_mode():
        whole = bank()
        found = stats(whole)
        assert torch.equal(calls.score(Actor(lambda bank, stats: scores()), whole, found), scores())
        with pytest.raises(ContractError, match=r"'bank\.up' changed"):
            calls.score(Actor(lambda bank, stats: bank.up.mul_(2)), whole, found)


def test_a_similarity_inside_an_assigner_is_named_itself() -> None:
    broken = Actor(lambda *inputs: matched(GOOD_MATCH[0] / 0))
    with pytest.raises(ContractError, match=r"^similarity 'actor', layer 7: affinity must be finite") as caught:
        calls.assign(Affinity(similarity=broken), bank(), retained(bank(), [0, 2]), stats(bank()))
    assert caught.value.kind == "similarity"


def test_a_similarity_sees_what_it_requires_and_not_what_its_assigner_does() -> None:
    seen: list[set[str]] = []
    spy = Actor(lambda bank, dropped, kept, stats: [seen.append(set(stats.values)), matched()][1])
    calls.assign(Affinity(similarity=spy), bank(), retained(bank(), [0, 2]), stats(bank()))
    assert seen == [{"routed"}] * 2


def test_what_a_held_component_requires_reaches_it_through_one_that_does_not_say_so() -> None:
    @dataclass(frozen=True)
    class Holder:
        similarity: Actor
        name: ClassVar[str] = "holder"
        requires: ClassVar[frozenset[str]] = frozenset()
        needs_groups: ClassVar[bool] = False

        def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
            calls.match(self.similarity, bank, 1, retention.kept, stats)
            return Assignment.empty()

    spy = Actor(lambda bank, dropped, kept, stats: [stats["routed"], matched()][1])
    assert len(calls.assign(Holder(spy), bank(), retained(bank(), [0, 2]), stats(bank()))) == 0


@pytest.mark.parametrize("error", [RecipeError("mine: must be so."), CheckpointError("layer 7: must be so.")])
def test_errors_that_a_component_raises_on_purpose_pass(error: Exception) -> None:
    def deed(*inputs: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        do_score(Actor(deed))
    assert caught.value is error


def test_an_interrupt_passes() -> None:
    def deed(*inputs: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do_score(Actor(deed))


def test_a_contract_error_of_a_components_own_gets_its_name() -> None:
    def deed(*inputs: Any) -> Any:
        raise ContractError("rows must be sorted. Got others instead.")

    with pytest.raises(ContractError, match=r"^scorer 'actor', layer 7: rows must be sorted\.") as caught:
        do_score(Actor(deed))
    assert caught.value.kind == "scorer"


def test_a_disk_that_fails_is_not_a_sources_fault() -> None:
    def deed(*inputs: Any) -> Any:
        raise PermissionError(13, "Permission denied", "calib.txt")

    with pytest.raises(PermissionError):
        do_tokens(Actor(deed))
    with pytest.raises(ContractError, match="PermissionError"):
        do_score(Actor(deed))


def test_statistics_that_were_not_collected_are_named_with_the_command_that_collects_them() -> None:
    lacking = replace(stats(bank()), values={"gate_sum": scores()})
    with pytest.raises(CheckpointError) as caught:
        calls.score(Actor(lambda *inputs: scores()), bank(), lacking)
    assert str(caught.value) == (
        "scorer 'actor', layer 7: statistics must hold routed, which it requires. Got gate_sum instead. "
        "Collect them with the recipe that names it: dernkit run RECIPE --model MODEL --out OUT."
    )


def test_the_sentence_of_the_exception_is_on_one_line_and_not_endless() -> None:
    def deed(*inputs: Any) -> Any:
        raise ValueError("first\nsecond " + "x" * 5000)

    with pytest.raises(ContractError, match=r"Got ValueError: first second x+") as caught:
        do_score(Actor(deed))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_call_says_where() -> None:
    assert Call("merge", Actor(do_score), 3).where == "merge 'actor', layer 3"
    assert Call("source", Actor(do_score)).where == "source 'actor'"
