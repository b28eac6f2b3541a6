"""What counts as the answer of a trace."""

import pytest

from tiercel.voting.answers import final_answer
from tiercel.voting.settings import VoteSettings
from tiercel.voting.tally import Count, Trace


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"So \boxed{12}, no: \boxed{025}.", "25"),
        (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{\frac{1}{2}} and then \boxed{unclosed", r"\frac{1}{2}"),
        (r"\boxed{\text{Tuesday}}", "tuesday"),
        ("We add.\nThe answer is 1,234.", "1234"),
        ("3 + 4 = 7", "7"),
        ("7", "7"),
        ("12 apples are left\n", "12"),
        ("**42**", "42"),
        ("First 3, then 5.\nThat is it", "5"),
        ("-0.50", "-0.5"),
        ("The answer is (B).", "b"),
        ("yes", "yes"),
        ("007", "7"),
        ("0.0", "0"),
        ("  \n", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "one, spellings",
    [
        (
            "1000",
            [
                "1,000",
                "1{,}000",
                r"1\,000",
                r"\$1000",
                "$1000$",
                r"1000\text{ dollars}",
                "1000 dollars",
                "1000.0",
                "+1000",
            ],
        ),
        ("-1234", ["\u22121234", "-1,234", "-1234.00", r"\text{}-1234"]),
        ("50", [r"50\%", "50%", "050", "50.", r"50^\circ", "50°", r"50\mathrm{km}"]),
        (r"\frac{1}{2}", [r"\frac12", r"\dfrac{1}{2}", r"\tfrac{2}{4}", "1/2", "1 / 2"]),
        (r"-\frac{3}{4}", [r"-\frac{3}{4}", r"\frac{-3}{4}", "-3/4"]),
        ("2.5", ["2.50", "02.5", r"2.5\text{ m}"]),
        ("(0,1)", ["(0, 1)", "( 0 , 1 )", r"\left(0, 1\right)"]),
        ("{1,2,3}", ["{1, 2, 3}", "{ 1,2, 3 }"]),
        ("b", ["(B)", r"\text{(b)}", "B."]),
    ],
)
def test_spellings_of_one_answer_are_one_vote(one, spellings):
    assert {final_answer(rf"\boxed{{{text}}}") for text in spellings} == {one}


def test_other_answers_stay_apart():
    texts = [
        "2x",
        "2",
        "2y",
        "3x",
        "12 or 13",
        "12",
        "x^2",
        "(0,1)",
        "(1,0)",
        "[0,1]",
        "1e3",
        "0.3",
        r"\frac{1}{3}",
        "0.333",
    ]
    assert len({final_answer(rf"\boxed{{{text}}}") for text in texts}) == len(texts)


def test_a_decimal_and_a_fraction_of_one_value_are_one_vote():
    settings = VoteSettings(k=3)
    count = Count(settings)
    for index, answer in enumerate(["0.5", r"\frac{1}{2}", "2"]):
        count.add(Trace(index, answer=answer, finish_reason="stop", confidence={"one": 1.0, "lowest": 1.0}))
    table = count.result().table
    assert [(row.answer, row.votes) for row in table] == [("0.5", 2), ("2", 1)]
