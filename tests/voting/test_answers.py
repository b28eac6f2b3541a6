"""What counts as the answer of a trace."""

import pytest

from tiercel.voting.answers import final_answer


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
