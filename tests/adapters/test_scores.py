"""Scores of replies, verdicts of significance tests, and win rates of blind votes."""

import pytest

from adapters.evaluation import votes
from adapters.evaluation.scores import compute_disagreement, compute_scores, normalize_text
from adapters.evaluation.significance import Contender, adjust_holm, build_verdicts, p_value
from tests.user_errors import assert_mentions


def test_each_metric_scores_what_its_name_says():
    scores = compute_scores("The Kitchen.", "kitchen")
    assert (scores["exact"], scores["normalized"], scores["rouge_l"]) == (
        0.0,
        1.0,
        pytest.approx(2 / 3),
    )
    assert compute_scores("kitchen", "kitchen")["chrf"] == pytest.approx(1.0)
    assert compute_scores("anything", " ") == {}
    assert normalize_text("  A  cat, the HAT ") == "cat hat"


def test_json_is_scored_by_field_where_json_is_expected():
    expected = '{"intent": "TurnOn", "slots": {"area": "hall", "level": 3}}'
    scores = compute_scores('{"slots": {"area": "hall", "level": 4}, "intent": "TurnOn"}', expected)
    assert (scores["json_valid"], scores["fields"]) == (1.0, pytest.approx(2 / 3))
    assert compute_scores("TurnOn", expected)["json_valid"] == 0.0
    assert "json_valid" not in compute_scores("yes", "no")
    assert "json_valid" not in compute_scores("3", "3")
    assert compute_scores("[" * 100_000, expected)["fields"] == 0.0


def test_disagreement_is_0_for_equal_replies_and_1_for_all_different():
    assert compute_disagreement(["yes", "Yes.", "yes"]) == 0.0
    assert compute_disagreement(["a b", "b c", "c d"]) == 1.0
    assert compute_disagreement(["yes"]) == 0.0


def make_contender(name, metric, values, **more):
    return Contender(
        name=name, rows={row: {metric: value} for row, value in enumerate(values)}, **more
    )


def test_a_significant_difference_is_a_sentence_with_its_figures():
    better = make_contender(
        "v3", "exact", [1.0] * 78 + [0.0] * 22, size_bytes=100, tokens_per_second=88.0
    )
    worse = make_contender(
        "v2", "exact", [1.0] * 60 + [0.0] * 40, size_bytes=100, tokens_per_second=100.0
    )
    (verdict,) = build_verdicts([worse, better])
    assert verdict.is_significant
    assert verdict.winner == "v3"
    assert (
        verdict.message
        == "v3 beats v2 on exact match, 78% vs. 60% on 100 rows, p < 0.001; same size; 12% slower."
    )


def test_a_difference_that_chance_explains_is_not_significant():
    (verdict,) = build_verdicts(
        [
            make_contender("v1", "exact", [1.0] * 6 + [0.0] * 6),
            make_contender("v2", "exact", [1.0] * 5 + [0.0] * 7),
        ]
    )
    assert not verdict.is_significant
    assert_mentions(verdict.message, "v1", "v2", "exact match", "50%", "42%", "12 rows")


def test_lower_perplexity_is_better():
    (verdict,) = build_verdicts(
        [
            make_contender("v1", "perplexity", [2.0 + i / 100 for i in range(20)]),
            make_contender("v2", "perplexity", [1.0 + i / 90 for i in range(20)]),
        ]
    )
    assert verdict.winner == "v2"
    assert_mentions(verdict.message, "perplexity", "1.11", "2.09")


def test_fewer_than_ten_common_rows_are_not_tested():
    (verdict,) = build_verdicts(
        [make_contender("v1", "exact", [1.0] * 5), make_contender("v2", "exact", [0.0] * 5)]
    )
    assert not verdict.is_significant
    assert "too few rows" in verdict.message


def test_p_values_are_those_of_the_published_tests():
    ours, theirs = [1.0] * 8 + [0.0] * 2, [0.0] * 8 + [1.0] * 2
    # Binomial, 8 of 10, two-sided
    assert p_value(ours, theirs, is_binary=True) == pytest.approx(0.109375)
    assert p_value([1.0], [1.0], is_binary=True) == 1.0
    assert adjust_holm([0.01, 0.04, 0.03]) == [
        pytest.approx(0.03),
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]


def test_the_interval_of_a_win_rate_is_wilsons():
    low, high = votes.win_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert votes.win_interval(0, 0) == (0.0, 1.0)


def test_a_half_point_of_a_tie_widens_the_interval_to_both_sides():
    low, high = votes.win_interval(5.5, 10)
    assert (low, high) == (votes.win_interval(5, 10)[0], votes.win_interval(6, 10)[1])


def test_perplexity_decides_where_exact_matches_are_equal():
    rows = range(20)
    one = Contender(
        name="v1", rows={row: {"exact": 0.0, "perplexity": 1.5 + row / 100} for row in rows}
    )
    two = Contender(
        name="v2", rows={row: {"exact": 0.0, "perplexity": 1.9 + row / 100} for row in rows}
    )
    (verdict,) = build_verdicts([one, two])
    assert verdict.winner == "v1"
    assert_mentions(verdict.message, "perplexity", "1.6", "1.99", "20 rows", "p < 0.001")
    three = Contender(
        name="v3",
        rows={row: {"exact": float(row == 0), "perplexity": 1.9 + row / 100} for row in rows},
    )
    (verdict,) = build_verdicts([one, three])
    assert not verdict.is_significant
    first, second = verdict.message.split(". v1 ")
    assert_mentions(first, "v3 and v1", "exact match", "5%", "0%")
    assert_mentions(second, "perplexity", "v3", "1.6", "1.99", "p < 0.001")


def test_correct_fields_decide_where_exact_matches_are_not_significant():
    first = Contender(
        name="v1", rows={row: {"exact": float(row < 5), "fields": 0.8} for row in range(40)}
    )
    second = Contender(
        name="v2", rows={row: {"exact": float(row < 4), "fields": 0.6} for row in range(40)}
    )
    (verdict,) = build_verdicts([first, second])
    assert verdict.is_significant and verdict.winner == "v1"
    assert verdict.message == "v1 beats v2 on correct fields, 80% vs. 60% on 40 rows, p < 0.001."


def test_two_significant_results_are_both_in_the_message():
    first = Contender(
        name="v1", rows={row: {"exact": float(row < 30), "fields": 0.7} for row in range(40)}
    )
    second = Contender(
        name="v2", rows={row: {"exact": float(row < 4), "fields": 0.9} for row in range(40)}
    )
    (verdict,) = build_verdicts([first, second])
    assert verdict.winner == "v1"
    first, second = verdict.message.split(". v2 ")
    assert_mentions(first, "v1", "exact match", "75%", "10%", "40 rows", "p < 0.001")
    assert_mentions(second, "correct fields", "90%", "70%", "p < 0.001")


def test_without_a_significant_result_all_tested_metrics_are_named():
    first = Contender(
        name="v1",
        rows={row: {"exact": float(row < 5), "fields": 0.8 + row % 2 / 10} for row in range(12)},
    )
    second = Contender(
        name="v2",
        rows={row: {"exact": float(row < 4), "fields": 0.9 - row % 2 / 10} for row in range(12)},
    )
    (verdict,) = build_verdicts(
        [first, Contender(name="v2", rows={**second.rows, 0: {"exact": 1.0, "fields": 0.5}})]
    )
    assert not verdict.is_significant
    assert_mentions(verdict.message, "v1", "v2", "exact match", "42%", "33%", "12 rows", "p = 1")
    assert "none on correct fields either" in verdict.message


def test_p_values_are_adjusted_for_all_metrics_tested():
    """Eleven of twelve rows have lower perplexity: significant alone, but not beside two tests
    without a difference.
    """
    same = {"exact": 1.0, "fields": 1.0}
    ours = {row: 1.0 + row / 100 for row in range(12)}
    theirs = {row: value + (0.5 + row / 50 if row < 11 else -0.9) for row, value in ours.items()}
    contenders = [
        Contender(name=name, rows={row: {"perplexity": p} for row, p in one.items()})
        for name, one in (("v1", ours), ("v2", theirs))
    ]
    tied_contenders = [
        Contender(name=one.name, rows={row: {**scores, **same} for row, scores in one.rows.items()})
        for one in contenders
    ]
    assert build_verdicts(contenders)[0].is_significant
    assert not build_verdicts(tied_contenders)[0].is_significant


def test_perplexities_of_two_bases_are_not_compared():
    one = Contender(
        name="v1",
        base=1,
        rows={row: {"exact": 0.0, "perplexity": 1.5 + row / 100} for row in range(20)},
    )
    two = Contender(
        name="v2",
        base=2,
        rows={row: {"exact": 0.0, "perplexity": 1.9 + row / 100} for row in range(20)},
    )
    (verdict,) = build_verdicts([one, two])
    assert not verdict.is_significant and "perplexity" not in verdict.message
